"""Ragged pictures to patches, on the device: what Qwen2VLImageProcessor hands to the model."""

import torch


def patchify(
    images: torch.Tensor,
    shapes: torch.Tensor,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut pictures into patches. On a GPU the host waits for nothing.

    Patches come picture by picture, in each square by square of `merge_size` x `merge_size` patches, row by row; of a patch come first the
    channels, then its repetitions in time, then rows and columns (transformers, image_processing_qwen2_vl.py, `patchify`). With merge_size 2
    a picture of 2 x 4 patches is cut so:

        0 1 | 4 5
        2 3 | 6 7

    Args:
        images: [pixels * 3], pictures one after another as [height, width, 3], of any type.
        shapes: int64 [n, 2], height and width of each, multiples of ``patch_size * merge_size``; on the same device.
        patch_size: side of a patch.
        merge_size: patches side by side in a square.
        temporal_patch_size: how often each patch is repeated.

    Returns:
        [patches, 3 * temporal_patch_size * patch_size ** 2], of the type of `images`; and int64 [n, 3]: 1, rows and columns of patches.
    """
    grid = shapes // patch_size
    counts = grid.prod(1)
    ends = counts.cumsum(0)
    patch = torch.arange(images.numel() // (3 * patch_size**2), device=images.device)
    picture = torch.searchsorted(ends, patch, right=True)
    begin, columns = (ends - counts)[picture], grid[picture, 1]
    square, within = (patch - begin) // merge_size**2, (patch - begin) % merge_size**2
    across = columns // merge_size
    row = square // across * merge_size + within // merge_size
    column = square % across * merge_size + within % merge_size
    # a patch's rows lie in one piece each: `patch_size` pixels of every line of its picture
    lines = torch.arange(patch_size, device=images.device)
    piece = (
        begin[:, None] * patch_size + (row[:, None] * patch_size + lines) * columns[:, None] + column[:, None]
    )
    patches = images.view(-1, patch_size, 3)[piece].permute(0, 3, 1, 2)
    repeated = patches[:, :, None].expand(-1, -1, temporal_patch_size, -1, -1)
    return repeated.reshape(len(patch), 3 * temporal_patch_size * patch_size**2), torch.cat(
        (torch.ones_like(grid[:, :1]), grid), 1
    )
