"""How a picture is fitted: which sizes come out of which, and the pixels. Each fit is a small value; `loaders.image` chooses one.

Crop      shorter edge to S, the centre kept                         1 picture of S x S
Pad       filled up to a square, then to S                           1 of S x S
Squash    to S x S, whatever the shape                               1 of S x S
AnyRes    squashed; then the best grid's tiles, padded               1 + rows * columns of S x S
Split     the tiles of a whole grid; then squashed                   rows * columns + 1 of S x S, or 1
Native    near its own size, sides multiples of a factor             1 of any size
"""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from loaders.decode import Pixels, refuse_bomb
from loaders.resample import Resample, resize
from shardify.errors import ImageError, UsageError

MAX_SIDE = 65_535
"""Longer sides are refused by every fit but Crop, which has its own bound: no JPEG has them, and squares over them would not fit in memory."""

MAX_ASPECT = 200
"""Native refuses pictures that are more elongated, as Qwen2VLImageProcessor does."""

Colour: TypeAlias = tuple[int, int, int]
Grid: TypeAlias = tuple[int, int]

_STRIP_BYTES = 16 * 1024 * 1024  # of padded rows in memory at a time
_MOST_SPLIT = 4096  # Idefics3ImageProcessor's MAX_IMAGE_SIZE


@dataclass(frozen=True, slots=True)
class Layout:
    """What a picture becomes.

    Attributes:
        tiles: pictures.
        height: of each of them, in pixels.
        width: likewise.
        rows: of the grid of tiles; 0 where there is none.
        columns: likewise.
    """

    tiles: int
    height: int
    width: int
    rows: int = 0
    columns: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels."""
        return self.tiles * self.height * self.width * 3


class Fit(Protocol):
    """One way to fit pictures."""

    def layout(self, height: int, width: int) -> Layout:
        """What a picture of this size becomes; raises ImageError."""

    def write(self, pixels: Pixels, out: Pixels) -> None:
        """Fit a picture, uint8 [height, width, 3], into memory, uint8 [tiles, height, width, 3] of its layout.

        Raises:
            ImageError: as `layout`; nothing is written then.
        """


@dataclass(frozen=True, slots=True)
class Crop:
    """Shorter edge to `size`, then the centre: the arithmetic of CLIPImageProcessor, truncations included."""

    size: int
    resample: Resample = "bicubic"

    def layout(self, height: int, width: int) -> Layout:
        """One square; refuses what only resizing would blow up."""
        refuse_bomb(*self._resized(height, width))  # 20,000 x 1 px would become 6,720,000 x 336
        return Layout(1, self.size, self.size)

    def write(self, pixels: Pixels, out: Pixels) -> None:
        """The centre."""
        height, width = self._resized(*pixels.shape[:2])
        refuse_bomb(height, width)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        resized = resize(pixels, height, width, self.resample)
        out[0] = resized[top : top + self.size, left : left + self.size]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size


@dataclass(frozen=True, slots=True)
class Pad:
    """To a square with the picture in its middle (LLaVA's `expand2square`), then to `size`; the square itself is never in memory.

    The filter works along rows first and columns second, so rows can be shrunk before the ones above and below are added, and a tall
    picture can be widened a strip of rows at a time.
    """

    size: int
    background: Colour
    resample: Resample = "bicubic"

    def layout(self, height: int, width: int) -> Layout:
        """One square."""
        _refuse_long(height, width)
        return Layout(1, self.size, self.size)

    def write(self, pixels: Pixels, out: Pixels) -> None:
        """The padded square."""
        height, width = pixels.shape[:2]
        _refuse_long(height, width)
        size, side = self.size, max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        square = np.empty((side, size, 3), np.uint8)  # its rows already at their final width
        colour = np.array(self.background, np.uint8)
        square[:top] = square[top + height :] = np.tile(colour, (size, 1))
        if width == side:
            square[top : top + height] = resize(pixels, height, size, self.resample)
        else:
            strip = np.tile(colour, (min(height, max(1, _STRIP_BYTES // (3 * side))), side, 1))
            for start in range(0, height, len(strip)):
                rows = pixels[start : start + len(strip)]
                strip[: len(rows), left : left + width] = rows
                square[start : start + len(rows)] = resize(strip[: len(rows)], len(rows), size, self.resample)
        out[0] = resize(square, size, size, self.resample)


@dataclass(frozen=True, slots=True)
class Squash:
    """To a square without regard to the shape, as SiglipImageProcessor.

    Attributes:
        size: the side of the square.
        resample: the filter.
        longest: first resize the longer edge to so many pixels, as Idefics3ImageProcessor does when it does not split. Default None.
    """

    size: int
    resample: Resample = "bicubic"
    longest: int | None = None

    def layout(self, height: int, width: int) -> Layout:
        """One square."""
        _refuse_long(height, width)
        return Layout(1, self.size, self.size)

    def write(self, pixels: Pixels, out: Pixels) -> None:
        """The square."""
        height, width = pixels.shape[:2]
        _refuse_long(height, width)
        if self.longest is not None:
            pixels = resize(pixels, *longest_edge(height, width, self.longest), self.resample)
        out[0] = resize(pixels, self.size, self.size, self.resample)


@dataclass(frozen=True, slots=True)
class AnyRes:
    """The whole picture squashed, then the tiles of the grid that suits it best: `process_anyres_image` (LLaVA-NeXT, llava/mm_utils.py).

    Attributes:
        size: S, the side of a tile.
        grids: (width, height) of the grids to choose from, in pixels, multiples of S; of equally good ones the first is taken.
        background: of what the picture does not cover.
        resample: the filter.
    """

    size: int
    grids: tuple[Grid, ...]
    background: Colour = (0, 0, 0)
    resample: Resample = "bicubic"

    def layout(self, height: int, width: int) -> Layout:
        """The base tile and those of the grid."""
        _refuse_long(height, width)
        grid_width, grid_height = best_grid(height, width, self.grids)
        rows, columns = grid_height // self.size, grid_width // self.size
        return Layout(1 + rows * columns, self.size, self.size, rows, columns)

    def write(self, pixels: Pixels, out: Pixels) -> None:
        """The base tile, then the grid's row by row."""
        height, width = pixels.shape[:2]
        layout = self.layout(height, width)
        size = self.size
        grid_height, grid_width = layout.rows * size, layout.columns * size
        # the rounding of the reference's resize_and_pad_image
        by_width, by_height = grid_width / width, grid_height / height
        if by_width < by_height:
            new_height, new_width = min(math.ceil(height * by_width), grid_height), grid_width
        else:
            new_height, new_width = grid_height, min(math.ceil(width * by_height), grid_width)
        out[0] = resize(pixels, size, size, self.resample)
        fitted = resize(pixels, new_height, new_width, self.resample)
        if fitted.shape[:2] != (grid_height, grid_width):
            out[1:] = self.background
        _cut(fitted, out[1:], layout, (grid_height - new_height) // 2, (grid_width - new_width) // 2)


@dataclass(frozen=True, slots=True)
class Split:
    """The longer edge to `longest`, both to multiples of S, cut into tiles; then the whole, squashed: Idefics3ImageProcessor.

    Attributes:
        size: S, the side of a tile (the processor's `max_image_size`).
        longest: of the longer edge, in pixels.
        resample: the filter.
    """

    size: int
    longest: int
    resample: Resample = "lanczos"

    def layout(self, height: int, width: int) -> Layout:
        """The tiles of the grid and the whole; a grid of one tile is the whole."""
        _refuse_long(height, width)
        grid_height, grid_width = self._grid(*longest_edge(height, width, self.longest))
        rows, columns = grid_height // self.size, grid_width // self.size
        if rows * columns == 1:
            return Layout(1, self.size, self.size)
        return Layout(rows * columns + 1, self.size, self.size, rows, columns)

    def write(self, pixels: Pixels, out: Pixels) -> None:
        """The grid's tiles row by row, then the whole."""
        height, width = pixels.shape[:2]
        layout = self.layout(height, width)
        height, width = longest_edge(height, width, self.longest)
        pixels = resize(pixels, height, width, self.resample)
        whole = resize(pixels, *self._grid(height, width), self.resample)
        _cut(whole, out[:-1], layout, 0, 0)
        out[-1] = resize(whole, self.size, self.size, self.resample)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        # resize_for_vision_encoder, the other edge's truncation included
        aspect, size = width / height, self.size
        if width >= height:
            width = math.ceil(width / size) * size
            height = math.ceil(int(width / aspect) / size) * size
        else:
            height = math.ceil(height / size) * size
            width = math.ceil(int(height * aspect) / size) * size
        return height, width


@dataclass(frozen=True, slots=True)
class Native:
    """Near its own size: sides that are multiples of `factor`, and no more and no fewer pixels than allowed (Qwen2-VL's `smart_resize`)."""

    factor: int
    min_pixels: int
    max_pixels: int
    resample: Resample = "bicubic"

    def layout(self, height: int, width: int) -> Layout:
        """One picture."""
        _refuse_long(height, width)
        if max(height, width) / min(height, width) > MAX_ASPECT:
            raise ImageError(
                "image-elongated", f'{width}x{height} px; fit="native" takes up to {MAX_ASPECT} to 1'
            )
        factor = self.factor
        new_height, new_width = (round(side / factor) * factor for side in (height, width))
        if new_height * new_width > self.max_pixels:
            ratio = math.sqrt((height * width) / self.max_pixels)
            new_height, new_width = (
                max(factor, math.floor(side / ratio / factor) * factor) for side in (height, width)
            )
        elif new_height * new_width < self.min_pixels:
            ratio = math.sqrt(self.min_pixels / (height * width))
            new_height, new_width = (math.ceil(side * ratio / factor) * factor for side in (height, width))
        return Layout(1, new_height, new_width)

    def write(self, pixels: Pixels, out: Pixels) -> None:
        """The picture."""
        out[0] = resize(pixels, out.shape[1], out.shape[2], self.resample)


def best_grid(height: int, width: int, grids: Sequence[Grid]) -> Grid:
    """The grid in which most of a picture's pixels survive, and of several the one with the least left over: `select_best_resolution`.

    Args:
        height: of the picture.
        width: of the picture.
        grids: (width, height) of each; of equally good ones the first is taken.
    """

    def rank(grid: Grid) -> tuple[int, int]:
        scale = min(grid[0] / width, grid[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - grid[0] * grid[1]

    return max(grids, key=rank)  # the first of the largest


def parse_grids(pinpoints: Any, size: int) -> tuple[Grid, ...]:
    """Grids as LLaVA writes them.

    Args:
        pinpoints: pairs (width, height) in pixels, as a list or as text; or text like ``(1x1),...,(6x6)``: all grids from so many tiles
            to so many (LLaVA-NeXT).
        size: S, the side of a tile.

    Raises:
        UsageError: something else, or sides that are no multiples of S.
    """
    pairs = pinpoints
    if isinstance(pinpoints, str):
        counts = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if counts:
            (first, low), (last, high) = counts[0], counts[-1]
            pairs = [(a * size, b * size) for a in range(first, last + 1) for b in range(low, high + 1)]
        else:
            try:
                pairs = ast.literal_eval(pinpoints)
            except (ValueError, SyntaxError):
                pairs = None
    try:
        grids = tuple((int(width), int(height)) for width, height in pairs)
    except (TypeError, ValueError):
        grids = ()
    if not grids:
        raise UsageError(
            f"grid_pinpoints={pinpoints!r}: pairs of (width, height) in pixels are needed, or '(1x1),...,(6x6)'"
        )
    if wrong := [grid for grid in grids if min(grid) < size or grid[0] % size or grid[1] % size]:
        raise UsageError(f"grid_pinpoints: {wrong[0]} is no multiple of the tile's side, {size} px")
    return grids


def longest_edge(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size whose longer edge is `longest`; the shorter one truncated, then made even (Idefics3ImageProcessor)."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        width, height = int(longest * aspect), longest
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    if max(height, width) > _MOST_SPLIT:
        aspect = width / height
        if width >= height:
            height, width = int(_MOST_SPLIT / aspect), _MOST_SPLIT
        else:
            height, width = _MOST_SPLIT, int(_MOST_SPLIT * aspect)
    return max(height, 1), max(width, 1)


def _cut(fitted: Pixels, tiles: Pixels, layout: Layout, top: int, left: int) -> None:
    """Lay a picture over a grid of tiles, its corner at (top, left) of the grid."""
    height, width = fitted.shape[:2]
    for number, tile in enumerate(tiles):
        row, column = divmod(number, max(layout.columns, 1))
        y, x = row * layout.height - top, column * layout.width - left  # of the tile's corner in the picture
        begin_y, begin_x = max(0, -y), max(0, -x)
        end_y, end_x = min(layout.height, height - y), min(layout.width, width - x)
        if begin_y < end_y and begin_x < end_x:
            tile[begin_y:end_y, begin_x:end_x] = fitted[y + begin_y : y + end_y, x + begin_x : x + end_x]


def _refuse_long(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise ImageError("image-too-large", f"{width}x{height} px; the longest side is {MAX_SIDE} px")
