"""Decoding on the device, by nvJPEG: encoded images in, `ImageTransform`'s geometry on the GPU, pixels out.

Never the default. nvJPEG's inverse DCT and upsampling are not libjpeg-turbo's, so pixels differ from the reference by a few levels; in
exchange the host's processors only hand bytes on. What nvJPEG should not judge (anything but whole 8-bit RGB and grey JPEGs), and what it
refuses, is decoded by `ImageTransform` on the host, as ever.

The library is nvImageCodec (https://docs.nvidia.com/cuda/nvimagecodec/); it reads each image's header into a `CodeStream`, and decodes a
list of these into device memory that torch sees by DLPack.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch.nn import functional
from torch.utils import dlpack

from loaders.batch import Batch, SampleFault
from loaders.batching import FILLER
from loaders.decode import MAX_PIXELS
from loaders.image import ImageTransform
from loaders.text import IGNORE_INDEX
from shardify.errors import ImageError, UsageError

Encoded = bytes | memoryview

MAX_DEVICE_PIXELS = 32 * 1024 * 1024
"""Larger pictures, or pictures that padding would make larger, are decoded on the host: in float32 one takes 12 bytes a pixel, twice."""

MAX_SHRINKING = 32
"""Pictures are made smaller on the device by at most this factor; the shared memory of torch's kernel sets a limit a little further on."""

_THREADS = 4  # of the host, for nvJPEG: cores are the workers'
_CPU_ONLY = -99999  # nvimgcodec.h: NVIMGCODEC_DEVICE_CPU_ONLY


@dataclass(frozen=True, slots=True)
class Decoded:
    """Images of a batch.

    Attributes:
        images: uint8 [n, 3, S, S] on the device, channels last in memory; black where there is a fault.
        faults: of those that could not be decoded on the host either, by number.
        on_host: how many were decoded there.
    """

    images: torch.Tensor
    faults: dict[int, ImageError]
    on_host: int


class NvjpegDecoder:
    """Decodes and fits batches of encoded images on a device.

    Args:
        transform: the size and the fit.
        device: a CUDA device.
        library: nvImageCodec; by default the installed one.

    Raises:
        UsageError: no CUDA, or no nvImageCodec, with what to install.
    """

    def __init__(self, transform: ImageTransform, device: torch.device, *, library: Any = None) -> None:
        if transform.fit not in ("crop", "pad"):
            raise UsageError(f'decode="nvjpeg" has no fit {transform.fit!r}; there are crop, pad')
        if transform.resample not in (None, "bicubic"):
            raise UsageError(f'decode="nvjpeg" has no filter {transform.resample!r}; there is bicubic')
        if library is None:
            library = _installed(device)
        self._transform, self._device, self._library = transform, device, library
        self._parameters = library.DecodeParams(apply_exif_orientation=False)  # as LLaVA does
        # what nvJPEG refuses is decoded exactly, by `ImageTransform`; the library's own decoders on the host serve its tests without a GPU
        cuda = device.type == "cuda"
        kinds = ("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU") if cuda else ("CPU_ONLY",)
        self._decoder = library.Decoder(
            device_id=device.index if cuda else _CPU_ONLY,
            max_num_cpu_threads=max(1, min(_THREADS, len(os.sched_getaffinity(0)) - 1)),
            backends=[library.Backend(getattr(library.BackendKind, kind)) for kind in kinds],
            options=":fancy_upsampling=1",  # as libjpeg does
        )

    def __call__(self, images: Sequence[Encoded]) -> Decoded:
        """Decode and fit, on the current stream.

        Args:
            images: encoded, in any format Pillow reads.
        """
        size = self._transform.size
        fitted = torch.zeros(len(images), size, size, 3, dtype=torch.uint8, device=self._device)
        fitted = fitted.permute(0, 3, 1, 2)
        faults: dict[int, ImageError] = {}
        mine = [number for number, data in enumerate(images) if suits_nvjpeg(data, self._transform)]
        decoded = dict(zip(mine, self._decode([images[number] for number in mine]), strict=True))
        on_host = 0
        for number, data in enumerate(images):
            pixels = decoded.pop(number, None)
            if pixels is not None:
                fitted[number] = fit(pixels, self._transform)
                continue
            on_host += 1
            try:
                fitted[number] = self._transform(data).to(self._device)
            except ImageError as error:
                faults[number] = error
        return Decoded(fitted, faults, on_host)

    def _decode(self, images: Sequence[Encoded]) -> list[torch.Tensor | None]:
        """Pixels, uint8 [height, width, 3] on the device, in order; None for what the library refuses."""
        streams = [self._stream(data) for data in images]
        known = [stream for stream in streams if stream is not None]
        found = self._run(known)
        # older versions leave refused ones out of the list, without a word which
        if len(found) != len(known):
            found = [image for stream in known for image in self._run([stream]) or [None]]
        pixels = (None if image is None else _as_tensor(image, self._device) for image in found)
        return [None if stream is None else next(pixels) for stream in streams]

    def _stream(self, data: Encoded) -> Any:
        try:
            return self._library.CodeStream(np.frombuffer(data, np.uint8))
        except (RuntimeError, ValueError):  # it reads the header, which it may find damaged
            return None

    def _run(self, streams: list[Any]) -> list[Any]:
        if not streams:
            return []
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        found: list[Any] = self._decoder.decode(streams, params=self._parameters, cuda_stream=stream)
        return found


def _as_tensor(image: Any, device: torch.device) -> torch.Tensor | None:
    # without CUDA the library makes no DLPack capsules
    pixels = torch.from_numpy(np.array(image)) if device.type == "cpu" else dlpack.from_dlpack(image)
    # the library may keep grey, or alpha, as its versions see fit
    return pixels if pixels.dtype == torch.uint8 and pixels.dim() == 3 and pixels.shape[2] == 3 else None


def suits_nvjpeg(data: Encoded, transform: ImageTransform) -> bool:
    """Whether an image is for the device: a whole 8-bit grey or YCbCr JPEG of a size that is no trouble there.

    A cut-off JPEG is not: nvJPEG would fill up what is missing, and not say so.
    """
    if data[:2] != b"\xff\xd8" or bytes(data[-2:]) != b"\xff\xd9":
        return False
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    if colour not in ("Gray", "YCbCr"):
        return False
    area: int = max(height, width) ** 2 if transform.fit == "pad" else height * width
    shrinking: float = (max if transform.fit == "pad" else min)(height, width) / transform.size
    fitted: float = (
        transform.size**2 * max(height, width) / min(height, width)
    )  # before the centre is cut out
    return area <= MAX_DEVICE_PIXELS and fitted <= MAX_PIXELS and shrinking <= MAX_SHRINKING


def fit(pixels: torch.Tensor, transform: ImageTransform) -> torch.Tensor:
    """`ImageTransform`'s geometry, in torch operations that run on any device.

    Args:
        pixels: uint8 [height, width, 3].
        transform: the size and the fit.

    Returns:
        uint8 [3, S, S], within 2/255 of what `ImageTransform` makes of the same pixels.
    """
    size = transform.size
    image = pixels.permute(2, 0, 1)[None].to(torch.float32)
    height, width = pixels.shape[:2]
    if transform.fit == "crop":
        if height <= width:
            new_height, new_width = size, int(size * width / height)
        else:
            new_height, new_width = int(size * height / width), size
        top, left = (new_height - size) // 2, (new_width - size) // 2
        fitted = _resize(image, new_height, new_width)[:, :, top : top + size, left : left + size]
    else:
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        square = image.new_empty(1, 3, side, side)
        for channel, value in enumerate(transform.padding):
            square[:, channel] = value
        square[:, :, top : top + height, left : left + width] = image
        fitted = _resize(square, size, size)
    return fitted[0].to(torch.uint8)


def _resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pillow's bicubic, float32 [1, 3, h, w]: a pass for each axis, each rounded and clipped, in the order `loaders.resample` explains."""
    lost_rows, lost_columns = image.shape[2] - height, image.shape[3] - width
    if lost_rows > 0 and lost_columns and lost_rows > 2 * lost_columns:
        return _pass(_pass(image, height, image.shape[3]), height, width)
    return _pass(_pass(image, image.shape[2], width), height, width)


def _pass(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if tuple(image.shape[2:]) == (height, width):
        return image
    resized = functional.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255)


def invalidate(batch: Batch, faults: Mapping[int, ImageError]) -> Batch:
    """A batch in which the samples of some images are invalid; their places, tokens and images stay.

    Args:
        batch: on the host.
        faults: by number of the image.
    """
    if not faults:
        return batch
    keys, positions, valid = list(batch.keys), batch.positions.clone(), batch.valid.clone()
    records = None if batch.records is None else list(batch.records)
    labels = None if batch.labels is None else batch.labels.clone()
    told = list(batch.faults)
    for image, error in sorted(faults.items()):
        sample = int(batch.image_samples[image])
        if not valid[sample]:
            continue  # another of its images was told already
        told.append(SampleFault(int(positions[sample]), keys[sample], "", -1, error.code, error.detail))
        keys[sample], positions[sample], valid[sample] = "", FILLER, False
        if records is not None:
            records[sample] = b""
        if labels is not None:
            labels[_tokens_of(batch, sample)] = IGNORE_INDEX
    changed: dict[str, Any] = {"keys": keys, "positions": positions, "valid": valid}
    return replace(batch, **changed, records=records, labels=labels, faults=tuple(told))


def _tokens_of(batch: Batch, sample: int) -> torch.Tensor:
    """Which tokens of a batch are a sample's: bool [B, L]."""
    assert batch.input_ids is not None
    mine = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    row = int(batch.rows[sample])
    mine[row] = True
    if batch.segment_ids is not None and batch.attention_mask is not None:
        segments = batch.segment_ids[row][batch.attention_mask[row]].unique_consecutive()  # type: ignore[no-untyped-call]
        if len(segments) == int(
            (batch.rows == row).sum()
        ):  # else the whole row: rather too few tokens than wrong ones
            mine[row] = batch.segment_ids[row] == segments[int((batch.rows[:sample] == row).sum())]
    return mine


def _installed(device: torch.device) -> Any:
    """The nvImageCodec module."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UsageError(
            f'decode="nvjpeg" on {str(device)!r}: a CUDA device is needed; decode="cpu" needs none'
        )
    try:
        return importlib.import_module("nvidia.nvimgcodec")
    except ImportError as error:
        cuda = (torch.version.cuda or "12").split(".")[0]
        raise UsageError(
            f'decode="nvjpeg" needs nvImageCodec ({error}): pip install "nvidia-nvimgcodec-cu{cuda}[nvjpeg]"'
        ) from error
