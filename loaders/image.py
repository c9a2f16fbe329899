"""`ImageTransform`: image bytes to uint8 pixels, as CLIPImageProcessor, LLaVA's training code and their relatives see them.

What a pixel is, Pillow's ``Image.open(...).convert("RGB")`` says (`loaders.decode`); what a resized pixel is, its filters (`loaders.resample`).
Both are met to within 2/255, several times faster. What is resized to what, `loaders.fits` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from loaders import fits
from loaders.arguments import integer
from loaders.decode import Picture, Pixels, pixels_of, size_of
from loaders.resample import Resample
from shardify.errors import ImageError, UsageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per channel, of pixels in 0 to 1 (openai/clip-vit-large-patch14-336, preprocessor_config.json)."""

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280
"""Of ``fit="native"``, Qwen2VLImageProcessor's defaults."""

Fit = Literal["crop", "pad", "squash", "anyres", "split", "native"]

_ONLY_FOR: dict[str, tuple[Fit, ...]] = {
    "grid_pinpoints": ("anyres",),
    "pad_several": ("anyres",),
    "background": ("pad", "anyres"),
    "longest_edge": ("split", "squash"),
    "min_pixels": ("native",),
    "max_pixels": ("native",),
}
_VERSION = 1  # of sizes; part of the fingerprint


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Encoded image to uint8 RGB.

    EXIF orientation is ignored, alpha dropped, and of an animation the first frame taken, as LLaVA does. docs/images.md shows each fit.

    Attributes:
        size: the side S of the squares that come out, in pixels. Default 336. Of no meaning for ``native``.
        fit: ``crop`` (default, LLaVA's pretraining and CLIPImageProcessor): the shorter edge becomes S and the centre is kept.
            ``pad`` (LLaVA's fine-tuning, `expand2square`): filled up to a square, then resized.
            ``squash`` (SiglipImageProcessor): resized to the square, whatever the shape.
            ``anyres`` (LLaVA-NeXT): the picture squashed, and the tiles of the grid that suits it best.
            ``split`` (Idefics3ImageProcessor, SmolVLM's): the tiles of a grid, and the picture squashed.
            ``native`` (Qwen2VLImageProcessor): near its own size, sides multiples of ``patch_size * merge_size``; `to_patches` makes patches.
        mean: per channel, of pixels in 0 to 1; for `normalize` and the colour of padding. Default CLIP's.
        std: per channel, for `normalize`. Default CLIP's.
        background: the colour of padding, 0 to 255; by default the mean's for ``pad``, black for ``anyres``.
        resample: the filter: ``bicubic`` (default) and ``bilinear`` within 2/255 of Pillow, ``lanczos`` (default of ``split``) by Pillow.
        grid_pinpoints: for ``anyres``, (width, height) of the grids in pixels, as a list or as text, or text like ``(1x1),...,(6x6)``.
            Default LLaVA-NeXT's, scaled to S: 1x2, 2x1, 2x2, 3x1 and 1x3 tiles. transformers' `image_grid_pinpoints` are (height, width).
        pad_several: for ``anyres``, samples with several pictures have each padded to one square of the mean's colour, as LLaVA-NeXT trains
            and LlavaOnevisionImageProcessor does. Default False.
        longest_edge: of the picture before it is split, in pixels, default 4 * S; for ``squash`` before it is squashed, default None, as it is.
        min_pixels: for ``native``, of a picture that comes out. Default 3,136.
        max_pixels: for ``native``. Default 1,003,520.
        patch_size: for ``native``, the side of a patch. Default 14.
        merge_size: for ``native``, patches side by side that the model makes one token of. Default 2.
        temporal_patch_size: for ``native``, how often each patch is repeated. Default 2.

    Raises:
        UsageError: values that are impossible, or that mean nothing for the fit.
    """

    size: int = 336
    fit: Fit = field(default="crop", kw_only=True)
    mean: tuple[float, float, float] = field(default=CLIP_MEAN, kw_only=True)
    std: tuple[float, float, float] = field(default=CLIP_STD, kw_only=True)
    background: tuple[int, int, int] | None = field(default=None, kw_only=True)
    resample: Resample | None = field(default=None, kw_only=True)
    grid_pinpoints: Any = field(default=None, kw_only=True)
    pad_several: bool = field(default=False, kw_only=True)
    longest_edge: int | None = field(default=None, kw_only=True)
    min_pixels: int | None = field(default=None, kw_only=True)
    max_pixels: int | None = field(default=None, kw_only=True)
    patch_size: int = field(default=14, kw_only=True)
    merge_size: int = field(default=2, kw_only=True)
    temporal_patch_size: int = field(default=2, kw_only=True)
    _alone: fits.Fit = field(init=False, repr=False, compare=False)
    _among: fits.Fit = field(init=False, repr=False, compare=False)  # several pictures of a sample

    def __post_init__(self) -> None:
        for name in ("size", "patch_size", "merge_size", "temporal_patch_size"):
            object.__setattr__(self, name, integer(name, getattr(self, name), least=1))
        if self.fit not in get_args(Fit):
            raise UsageError(f"no fit {self.fit!r}; there are {', '.join(get_args(Fit))}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three(name, getattr(self, name)))
        if 0 in self.std:
            raise UsageError(f"std {self.std}: no value may be 0")
        self._settle()
        alone = self._make()
        object.__setattr__(self, "_alone", alone)
        among: fits.Fit = alone
        if self.pad_several:
            among = fits.Pad(self.size, self._mean_colour(), self._filter)
        object.__setattr__(self, "_among", among)

    @classmethod
    def from_processor(cls, processor: Any) -> "ImageTransform":
        """The transform that does what an image processor of transformers does.

        Args:
            processor: of CLIP, SigLIP, LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL (2.5, 3), Idefics3 or SmolVLM; a processor that has one as
                `image_processor`; its settings as a dict; or the path of a preprocessor_config.json, or of the folder with it.

        Raises:
            UsageError: a setting that cannot be honoured, named; or another kind of processor.
        """
        from loaders.processors import settings_of, transform_arguments

        settings: Mapping[str, Any] = settings_of(processor)
        return cls(**transform_arguments(settings))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of every picture and tile: (3, S, S).

        Raises:
            UsageError: ``native``, where each has its own.
        """
        if self.is_ragged:
            raise UsageError('with fit="native" pictures have no common shape')
        return 3, self.size, self.size

    @property
    def is_ragged(self) -> bool:
        """Whether each picture has a shape of its own: ``native``."""
        return self.fit == "native"

    @property
    def is_tiled(self) -> bool:
        """Whether a picture becomes several tiles: ``anyres`` and ``split``."""
        return self.fit in ("anyres", "split")

    @property
    def fingerprint(self) -> str:
        """Names what decides about the sizes that come out; tile counts are kept under it."""
        names = (
            "fit",
            "size",
            "pad_several",
            "longest_edge",
            "min_pixels",
            "max_pixels",
            "patch_size",
            "merge_size",
        )
        grids = self._grids() if self.fit == "anyres" else ()
        return " ".join(str(value) for value in (_VERSION, *(getattr(self, name) for name in names), grids))

    def layout(self, height: int, width: int, *, images: int = 1) -> fits.Layout:
        """What a picture of a size becomes: how many tiles, of which size.

        Args:
            height: of the picture, in pixels.
            width: likewise.
            images: of its sample.

        Raises:
            ImageError: ``image-too-large``, ``image-elongated`` (``native``), or ``image-undecodable``: without any pixels, as sidecars have images
                that cannot be read.
        """
        if height < 1 or width < 1:
            raise ImageError("image-undecodable", f"{width}x{height} px")
        return self._fit(images).layout(height, width)

    def layout_of(self, data: Picture, *, images: int = 1) -> fits.Layout:
        """The same of an image, from its header: what a text needs to know before pictures are decoded.

        Raises:
            ImageError: as for a call, as far as the header tells.
        """
        return self.layout(*size_of(data), images=images)

    def prepare(self, data: Picture, *, images: int = 1) -> "Prepared":
        """Decode one image, to be fitted into memory whose place depends on how much it needs.

        Args:
            data: as for a call.
            images: of its sample.

        Raises:
            ImageError: as for a call.
        """
        pixels = pixels_of(data)
        return Prepared(pixels, self._fit(images), self.layout(*pixels.shape[:2], images=images))

    def __call__(self, data: Picture) -> torch.Tensor:
        """Decode and fit one image.

        Args:
            data: the encoded image, in any format Pillow reads; or one of Pillow's; or pixels, uint8 [height, width, 3].

        Returns:
            uint8 [3, S, S]; [tiles, 3, S, S] with ``anyres`` (the base tile first) and ``split`` (it comes last); [3, H, W] with ``native``;
            contiguous.

        Raises:
            ImageError: ``image-empty``, ``image-too-large``, ``image-undecodable``, or ``image-elongated`` (``native``); never anything else
                for any bytes.
        """
        tiles = self._fitted(data)
        planes = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()
        return planes if self.is_tiled else planes[0]

    def into(self, data: Picture, out: torch.Tensor) -> None:
        """Decode and fit one image into memory that is there already.

        Args:
            data: as for a call.
            out: uint8 of the shape that a call returns, with any strides. Untouched when an error is raised.

        Raises:
            ImageError: as for a call.
        """
        tiles = torch.from_numpy(self._fitted(data)).permute(0, 3, 1, 2)
        out.copy_(tiles if self.is_tiled else tiles[0])

    def normalize(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The model's input: (images / 255 - mean) / std.

        Args:
            images: uint8 [..., 3, H, W], or flat pictures as a batch has them with ``native``, uint8 [bytes]; on any device.
            dtype: of the result; the arithmetic is done in float32.

        Returns:
            A new tensor of `dtype` and the same shape, device and memory order.
        """
        result = images.to(torch.float32)
        # flat pictures lie pixel by pixel
        channels = result.view(-1, 3).T if images.dim() == 1 else result.movedim(-3, 0)
        for channel, mean, std in zip(channels, self.mean, self.std, strict=True):
            # by plain numbers: constants in a tensor would be copied to the device, and waited for
            channel.mul_(1 / (255 * std)).sub_(mean / std)
        return result.to(dtype)

    def to_patches(self, images: torch.Tensor, shapes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures of ``native`` as Qwen2VLImageProcessor cuts them, on the device where they are: see `loaders.patches.patchify`.

        Args:
            images: flat, uint8 or normalised: `Batch.images`.
            shapes: int64 [n, 2]: `Batch.image_shapes`.

        Returns:
            `pixel_values` [patches, 3 * temporal_patch_size * patch_size ** 2], of the type of `images`, and `image_grid_thw`, int64 [n, 3].
        """
        from loaders.patches import patchify

        return patchify(
            images,
            shapes,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
        )

    @property
    def padding(self) -> tuple[int, int, int]:
        """The colour around a padded picture."""
        if self.background is not None:
            return self.background
        return (0, 0, 0) if self.fit == "anyres" else self._mean_colour()

    @property
    def _filter(self) -> Resample:
        return self.resample or ("lanczos" if self.fit == "split" else "bicubic")

    def _grids(self) -> tuple[fits.Grid, ...]:
        if self.grid_pinpoints is None:
            return tuple((columns * self.size, rows * self.size) for columns, rows in _GRIDS)
        grids: tuple[fits.Grid, ...] = self.grid_pinpoints
        return grids

    def _mean_colour(self) -> tuple[int, int, int]:
        red, green, blue = (
            int(value * 255) for value in self.mean
        )  # LLaVA truncates: (122, 116, 104) for CLIP
        return red, green, blue

    def _fit(self, images: int) -> fits.Fit:
        return self._alone if images <= 1 else self._among

    def _fitted(self, data: Picture) -> npt.NDArray[np.uint8]:
        prepared = self.prepare(data)
        tiles = np.empty(prepared.nbytes, np.uint8)
        prepared.write(tiles)
        return tiles.reshape(-1, *prepared.shape, 3)

    def _settle(self) -> None:
        """Check the options, and write them as they are meant."""
        for name, meant in _ONLY_FOR.items():
            if getattr(self, name) not in (None, False) and self.fit not in meant:
                raise UsageError(
                    f"{name}={getattr(self, name)!r} means nothing for fit={self.fit!r}, only for {' and '.join(meant)}"
                )
        if self.resample not in (None, *get_args(Resample)):
            raise UsageError(f"resample={self.resample!r}: there are {', '.join(get_args(Resample))}")
        if self.background is not None:
            colour = _three("background", self.background)
            if not all(0 <= value <= 255 and value == int(value) for value in colour):
                raise UsageError(
                    f"background={self.background!r}: three whole numbers from 0 to 255 are needed"
                )
            object.__setattr__(self, "background", tuple(int(value) for value in colour))
        if self.grid_pinpoints is not None:
            object.__setattr__(self, "grid_pinpoints", fits.parse_grids(self.grid_pinpoints, self.size))
        for name in ("longest_edge", "min_pixels", "max_pixels"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), least=1)
        low, high = self.min_pixels or MIN_PIXELS, self.max_pixels or MAX_PIXELS
        if low > high:
            raise UsageError(f"min_pixels={low} is more than max_pixels={high}")

    def _make(self) -> fits.Fit:
        size, resample = self.size, self._filter
        if self.fit == "crop":
            return fits.Crop(size, resample)
        if self.fit == "pad":
            return fits.Pad(size, self.padding, resample)
        if self.fit == "squash":
            return fits.Squash(size, resample, self.longest_edge)
        if self.fit == "anyres":
            return fits.AnyRes(size, self._grids(), self.padding, resample)
        if self.fit == "split":
            return fits.Split(size, self.longest_edge or 4 * size, resample)
        factor = self.patch_size * self.merge_size
        return fits.Native(factor, self.min_pixels or MIN_PIXELS, self.max_pixels or MAX_PIXELS, resample)


_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # liuhaotian/llava-v1.6-*: image_grid_pinpoints


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A decoded image before it is fitted.

    Attributes:
        pixels: uint8 [height, width, 3].
        fit: that fits it.
        layout: what it becomes.
    """

    pixels: Pixels
    fit: fits.Fit
    layout: fits.Layout

    @property
    def tiles(self) -> int:
        """Pictures that it becomes."""
        return self.layout.tiles

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of each of them."""
        return self.layout.height, self.layout.width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width before fitting."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that `write` needs."""
        return self.layout.nbytes

    def write(self, memory: npt.NDArray[np.uint8]) -> None:
        """Fit it into `memory`, uint8 [nbytes], as [tiles, height, width, 3]."""
        self.fit.write(self.pixels, memory.reshape(self.tiles, *self.shape, 3))


def _three(name: str, values: Any) -> tuple[float, float, float]:
    try:
        first, second, third = map(float, values)
    except (TypeError, ValueError):
        raise UsageError(f"{name} {values!r}: three numbers are needed, one for each channel") from None
    return first, second, third
