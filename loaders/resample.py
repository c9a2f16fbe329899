"""Resizing pixels as Pillow does, faster: its bicubic and bilinear filters by torch's antialiased uint8 kernels, to within 2/255; Lanczos by Pillow."""

from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from loaders.decode import Pixels

Resample: TypeAlias = Literal["bicubic", "bilinear", "lanczos"]


def resize(pixels: Pixels, height: int, width: int, resample: Resample = "bicubic") -> Pixels:
    """Pixels at another size, uint8 [height, width, 3].

    Pillow's two passes round and clip between them, so that their order shows at sharp edges. Pillow shrinks rows first, as torch always does,
    unless columns lose more than twice as many pixels (Pillow 13.0; seen by comparing both orders on 4,000 random pictures and sizes): pictures
    more than twice as tall as wide.
    """
    if resample == "lanczos":  # torch has no such filter before 2.13
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(resized)
    lost_rows, lost_columns = pixels.shape[0] - height, pixels.shape[1] - width
    if lost_rows > 0 and lost_columns and lost_rows > 2 * lost_columns:
        pixels = np.ascontiguousarray(_rows_first(pixels, height, pixels.shape[1], resample))
    return _rows_first(pixels, height, width, resample)


def _rows_first(pixels: Pixels, height: int, width: int, resample: Resample) -> Pixels:
    # seen as a batch of one in channels-last order, which torch has a fast path for and keeps in the result
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(batch, size=(height, width), mode=resample, antialias=True)
    result: Pixels = resized.permute(0, 2, 3, 1)[0].numpy()
    return result
