"""What stands in a prompt for a picture: the text that transformers' processors put in the place of its one placeholder.

    LLaVA                          the image token, once for each patch that the model keeps
    LLaVA-NeXT, LLaVA-OneVision    likewise: patches of the whole, those of the tiles that the picture covers, and one behind each of their rows
    Qwen2-VL (2.5, 3)              once for each square of patches that the model merges
    Idefics3, SmolVLM              row by row each tile with its number, then the whole, so many image tokens each

Sizes of pictures become sizes of tiles by the loader's image transform, so that texts and pixels agree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

from loaders.image import ImageTransform
from shardify.errors import UsageError

Size: TypeAlias = tuple[int, int]
"""Height and width of a picture before it is fitted, in pixels."""

_MUCH = 1.1  # LLaVA-OneVision: features are made fewer only where that is worth it


class Expansion(Protocol):
    """What one family puts in the place of pictures."""

    needs_sizes: ClassVar[bool]

    def __call__(self, sizes: Sequence[Size]) -> list[str]:
        """The texts for all the pictures of a sample; where `needs_sizes` is False only the number of `sizes` counts.

        Raises:
            ImageError: a picture that the image transform refuses.
        """


@dataclass(frozen=True, slots=True)
class Fixed:
    """So many image tokens, whatever the picture."""

    needs_sizes: ClassVar[bool] = False
    token: str
    count: int

    def __call__(self, sizes: Sequence[Size]) -> list[str]:
        """The same text for each."""
        return [self.token * self.count] * len(sizes)


@dataclass(frozen=True, slots=True)
class OfGrid:
    """LLaVA-NeXT and LLaVA-OneVision (transformers, processing_llava_next.py, `_get_number_of_features`).

    Attributes:
        token: the image token.
        image: with ``fit="anyres"``.
        side: patches along the side of a tile.
        whole: tokens of the picture as one tile, as many as the model keeps.
        most: tiles of which all features are kept (``anyres_max_9``); None for all.
    """

    needs_sizes: ClassVar[bool] = True
    token: str
    image: ImageTransform
    side: int
    whole: int
    most: int | None = None

    def __call__(self, sizes: Sequence[Size]) -> list[str]:
        """By the grid that suits each."""
        if len(sizes) > 1 and self.image.pad_several:
            return [self.token * (self.whole + 1)] * len(sizes)  # one tile, and the end of its row
        return [self.token * self._count(height, width) for height, width in sizes]

    def _count(self, height: int, width: int) -> int:
        layout = self.image.layout(height, width)
        rows, columns = layout.rows * self.side, layout.columns * self.side
        # patches that lie wholly outside the picture are left out, on both sides alike
        if width / height > columns / rows:
            covered = int(round(height * (columns / width), 7))
            rows -= (rows - covered) // 2 * 2
        else:
            covered = int(round(width * (rows / height), 7))
            columns -= (columns - covered) // 2 * 2
        if self.most is not None:
            ratio = math.sqrt(rows * columns / (self.most * self.side**2))
            if ratio > _MUCH:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return self.whole + rows * columns + rows


@dataclass(frozen=True, slots=True)
class OfPatches:
    """Qwen2-VL: the product of ``image_grid_thw`` over ``merge_size ** 2``.

    Attributes:
        token: the image token.
        image: with ``fit="native"``.
    """

    needs_sizes: ClassVar[bool] = True
    token: str
    image: ImageTransform

    def __call__(self, sizes: Sequence[Size]) -> list[str]:
        """By the size that each has when it is fitted."""
        side = self.image.patch_size * self.image.merge_size
        layouts = [self.image.layout(height, width, images=len(sizes)) for height, width in sizes]
        return [self.token * (layout.height // side * (layout.width // side)) for layout in layouts]


@dataclass(frozen=True, slots=True)
class OfTiles:
    """Idefics3 and SmolVLM: the tiles of a grid row by row, then the whole.

    Attributes:
        token: the image token.
        around: what stands before each tile, and at the end.
        whole: what names the whole.
        count: image tokens of a tile.
        image: with ``fit="split"``, or ``squash``.
    """

    needs_sizes: ClassVar[bool] = True
    token: str
    around: str
    whole: str
    count: int
    image: ImageTransform

    def __call__(self, sizes: Sequence[Size]) -> list[str]:
        """By the grid of each."""
        return [self._text(height, width, len(sizes)) for height, width in sizes]

    def _text(self, height: int, width: int, images: int) -> str:
        layout = self.image.layout(height, width, images=images)
        tile = self.token * self.count
        lines = [
            "".join(
                f"{self.around}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(layout.columns)
            )
            for row in range(layout.rows)
        ]
        whole = f"{self.around}{self.whole}{tile}{self.around}"
        return "\n".join([*lines, "", whole]) if lines else whole


def expansion_of(processor: Any, token: str, image: ImageTransform | None) -> Expansion:
    """What a processor of transformers puts in the place of pictures.

    Args:
        processor: of LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL (2.5, 3), Idefics3 or SmolVLM.
        token: its image token.
        image: what fits the pictures; None for what its image processor does.

    Raises:
        UsageError: a processor of another kind, one that lacks a setting, or whose image processor cannot be followed.
    """
    names = {kind.__name__ for kind in type(processor).__mro__}
    make = next((make for family, make in _FAMILIES.items() if family in names), None)
    if make is None:
        raise UsageError(
            f"how {type(processor).__name__} puts images into a text is not known; there are {', '.join(_FAMILIES)}; where each image becomes "
            "as many tokens, whatever its size, give image_tokens="
        )
    return make(processor, token, image or ImageTransform.from_processor(processor))


def _of_llava(processor: Any, token: str, image: ImageTransform) -> Expansion:
    square = _fitting(image, "crop", "pad", "squash").shape[1:]
    rows, columns = (side // _setting(processor, "patch_size") for side in square)
    return Fixed(token, _kept(processor, rows * columns + processor.num_additional_image_tokens))


def _of_llava_next(processor: Any, token: str, image: ImageTransform) -> Expansion:
    side = image.size // _setting(processor, "patch_size")
    whole = _kept(processor, side * side + processor.num_additional_image_tokens)
    return OfGrid(token, _fitting(image, "anyres"), side, whole)


def _of_llava_onevision(processor: Any, token: str, image: ImageTransform) -> Expansion:
    whole = _setting(processor, "num_image_tokens")
    most = str(processor.vision_aspect_ratio).removeprefix("anyres_max_")
    if not most.isdigit():
        raise UsageError(
            f"vision_aspect_ratio={processor.vision_aspect_ratio!r} cannot be honoured: anyres_max_ and a number is needed"
        )
    return OfGrid(token, _fitting(image, "anyres"), math.isqrt(whole), _kept(processor, whole), int(most))


def _of_qwen(processor: Any, token: str, image: ImageTransform) -> Expansion:
    del processor
    return OfPatches(token, _fitting(image, "native"))


def _of_idefics(processor: Any, token: str, image: ImageTransform) -> Expansion:
    whole = getattr(processor, "global_image_tag", None) or processor.global_image_token
    return OfTiles(
        token,
        processor.fake_image_token,
        whole,
        _setting(processor, "image_seq_len"),
        _fitting(image, "split", "squash"),
    )


def _kept(processor: Any, features: int) -> int:
    """Without the first, where the model leaves it out (that of CLIP's class token)."""
    return features - int(processor.vision_feature_select_strategy == "default")


def _setting(processor: Any, name: str) -> int:
    value = getattr(processor, name, None)
    if not isinstance(value, int):
        raise UsageError(
            f"{type(processor).__name__}: {name} is {value!r}; without it nobody knows how many tokens an image becomes: set it on the processor"
        )
    return value


def _fitting(image: ImageTransform, *fits: str) -> ImageTransform:
    if image.fit not in fits:
        raise UsageError(
            f'an image transform with fit="{image.fit}" does not do what this processor does: fit="{fits[0]}" is needed'
        )
    return image


_FAMILIES: dict[str, Callable[[Any, str, ImageTransform], Expansion]] = {
    "LlavaProcessor": _of_llava,
    "LlavaNextProcessor": _of_llava_next,
    "LlavaOnevisionProcessor": _of_llava_onevision,
    "Qwen2VLProcessor": _of_qwen,
    "Qwen2_5_VLProcessor": _of_qwen,
    "Qwen3VLProcessor": _of_qwen,
    "Idefics3Processor": _of_idefics,
    "SmolVLMProcessor": _of_idefics,
}
