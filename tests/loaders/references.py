"""What LLaVA's code makes of an image, step by step with Pillow, before rescaling."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from loaders.image import CLIP_MEAN

LLAVA_16 = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""LLaVA-NeXT's grids, (width, height)."""


def fitted_by_pillow(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """`expand2square` where asked for, then CLIPImageProcessor's resizing and centre crop: uint8 [size, size, 3]."""
    image = image.convert("RGB")
    width, height = image.size
    if fit == "pad" and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in CLIP_MEAN))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    new = (size, other) if width <= height else (other, size)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    resized = image.resize(new, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def anyres_by_pillow(image: Image.Image, size: int, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """`process_anyres_image`: uint8 [tiles, size, size, 3]."""
    image = image.convert("RGB")
    width, height = image.size
    best, best_rank = None, (0, -math.inf)
    for grid in grids:
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        rank = (kept, kept - grid[0] * grid[1])
        if best is None or rank > best_rank:
            best, best_rank = grid, rank
    scale_w, scale_h = best[0] / width, best[1] / height
    if scale_w < scale_h:
        new = best[0], min(math.ceil(height * scale_w), best[1])
    else:
        new = min(math.ceil(width * scale_h), best[0]), best[1]
    canvas = Image.new("RGB", best)
    canvas.paste(image.resize(new), ((best[0] - new[0]) // 2, (best[1] - new[1]) // 2))
    tiles = [image.resize((size, size))]
    tiles += [
        canvas.crop((x, y, x + size, y + size))
        for y in range(0, best[1], size)
        for x in range(0, best[0], size)
    ]
    return np.stack([np.asarray(tile) for tile in tiles])
