"""Patches of ragged pictures against transformers' formula, written with reshapes and transposes of one picture at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.image import ImageTransform
from loaders.patches import patchify


def by_transposing(pixels: np.ndarray, patch: int, merge: int, time: int) -> np.ndarray:
    """image_processing_qwen2_vl.py: [C, gh, mh, ph, gw, mw, pw] -> [gh, gw, mh, mw, C, time, ph, pw], flattened to two dimensions."""
    height, width = pixels.shape[:2]
    planes = pixels.transpose(2, 0, 1)
    apart = planes.reshape(
        3, height // patch // merge, merge, patch, width // patch // merge, merge, patch
    ).transpose(1, 4, 2, 5, 0, 3, 6)
    repeated = np.repeat(apart[:, :, :, :, :, None], time, axis=5)
    return repeated.reshape(-1, 3 * time * patch**2)


@given(
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=0, max_size=4),
    patch=st.integers(1, 4),
    merge=st.integers(1, 3),
    time=st.integers(1, 3),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
)
@settings(max_examples=100)
def test_patches_are_those_of_the_formula(grids, patch, merge, time, dtype):
    generator = np.random.default_rng(0)
    sides = patch * merge
    pictures = [generator.integers(0, 256, (h * sides, w * sides, 3), dtype=np.uint8) for h, w in grids]
    flat = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *(p.reshape(-1) for p in pictures)]))
    shapes = torch.tensor([p.shape[:2] for p in pictures], dtype=torch.int64).reshape(-1, 2)
    values, grid = patchify(
        flat.to(dtype), shapes, patch_size=patch, merge_size=merge, temporal_patch_size=time
    )
    width = 3 * time * patch**2
    expected = np.concatenate(
        [np.zeros((0, width), np.uint8), *(by_transposing(p, patch, merge, time) for p in pictures)]
    )
    assert values.dtype == dtype
    assert torch.equal(values, torch.from_numpy(expected).to(dtype))
    assert grid.tolist() == [[1, h * merge, w * merge] for h, w in grids]


def test_the_order_of_patches_by_hand():
    # 4x8 pixels, patches of 2x2, squares of 2x2 patches; every pixel holds the number of its patch, counted row by row: 0 1 2 3 / 4 5 6 7
    rows, columns = np.mgrid[:4, :8] // 2
    pixels = np.repeat((rows * 4 + columns)[..., None], 3, axis=2).astype(np.uint8)
    values, _ = patchify(
        torch.from_numpy(pixels).reshape(-1),
        torch.tensor([[4, 8]]),
        patch_size=2,
        merge_size=2,
        temporal_patch_size=1,
    )
    assert values[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_flat_pictures_are_normalised_as_others():
    transform = ImageTransform(fit="native")
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    flat = transform.normalize(pixels.reshape(-1)).reshape(5, 7, 3)
    assert torch.equal(flat, transform.normalize(pixels.permute(2, 0, 1)).permute(1, 2, 0))
    assert transform.normalize(pixels.reshape(-1)[:0], torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_patches_on_the_device_are_the_same_and_wait_for_nothing():
    transform = ImageTransform(fit="native")
    shapes = torch.tensor([[56, 84], [28, 28], [112, 56]])
    flat = torch.randint(0, 256, (int(shapes.prod(1).sum()) * 3,), dtype=torch.uint8)
    expected, grid = transform.to_patches(transform.normalize(flat), shapes)
    there, where = flat.cuda(), shapes.cuda()
    transform.to_patches(transform.normalize(there), where)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, grid_there = transform.to_patches(transform.normalize(there), where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(values.cpu(), expected)
    assert torch.equal(grid_there.cpu(), grid)
