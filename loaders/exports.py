"""A batch as others want it: LLaVA's own collator's dict, and the arguments of a model of transformers."""

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from shardify.errors import UsageError

if TYPE_CHECKING:
    from loaders.batch import Batch

Tensor: TypeAlias = torch.Tensor


def to_llava(batch: "Batch") -> dict[str, Any]:
    """The dict that the collator of LLaVA's training makes (haotian-liu/LLaVA, llava/train/train.py, DataCollatorForSupervisedDataset).

        input_ids, labels    int64 [B, L]
        attention_mask       bool [B, L], ``input_ids != pad_token_id``: padding tokens inside a text are masked, too
        images               float32 [B, 3, S, S], normalised; of a sample without image zeros (not a normalised black picture)

    Where a sample has several images, `images` is a list, float32 [3, S, S] each, in the samples' order, zeros for a sample without any: LLaVA's
    model takes both. With ``fit="anyres"`` it is LLaVA-NeXT's dict (LLaVA-VL/LLaVA-NeXT, the same file):

        images               list of float32 [tiles, 3, S, S]; for a sample without image zeros [1, 3, S, S]; with `pad_several` [3, S, S] for the
                             images of a sample that has several
        image_sizes          list of (width, height) before fitting; (S, S) for a sample without image
        modalities           list of "image" or "text", one for each of `images`

    A filler is a sample without image; its one padding token stays attended, since a row without any gives NaN in some attention kernels.
    Images that are normalised already keep their type.

    Raises:
        UsageError: the batch has no text or no fitted images, its samples are packed, or the fit is none of LLaVA's.
    """
    if batch.input_ids is None or batch.labels is None or batch.attention_mask is None:
        raise UsageError("to_llava: this batch has no tokens; give the loader text=LlavaText(...)")
    if batch.segment_ids is not None:
        raise UsageError("to_llava: LLaVA's collator does not pack samples; leave out pack_tokens")
    images = _normalized(batch)
    if batch.image_fit.is_ragged or getattr(batch.image_fit, "fit", "") == "split":
        raise UsageError('to_llava: LLaVA\'s fits are "crop", "pad" and "anyres"')
    mask = batch.attention_mask
    if batch.pad_token_id is not None:
        mask = torch.where(batch.valid[:, None], batch.input_ids != batch.pad_token_id, mask)
    result = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": mask}
    counts = torch.bincount(batch.image_samples, minlength=len(batch.keys))
    if batch.image_tiles is not None:
        return result | _of_next(batch, images, counts.tolist())
    if int(counts.max()) <= 1:
        stacked = images.new_zeros(len(counts), *images.shape[1:])
        stacked[batch.image_samples] = images
        return result | {"images": stacked}
    own, listed = iter(images), []
    for count in counts.tolist():
        listed += [next(own) for _ in range(count)] or [images.new_zeros(images.shape[1:])]
    return result | {"images": listed}


def _of_next(batch: "Batch", tiles: Tensor, counts: list[int]) -> dict[str, Any]:
    """Images, sizes and modalities as LLaVA-NeXT's collator lists them."""
    assert batch.image_tiles is not None
    assert batch.image_sizes is not None
    own = zip(torch.split(tiles, batch.image_tiles.tolist()), batch.image_sizes.tolist(), strict=True)
    images, sizes, modalities = [], [], []
    for count in counts:
        for _ in range(count):
            image, (height, width) = next(own)
            padded = count > 1 and batch.image_fit.pad_several
            images.append(image[0] if padded else image)
            sizes.append((width, height))
            modalities.append("image")
        if not count:
            images.append(tiles.new_zeros(1, *tiles.shape[1:]))
            sizes.append((tiles.shape[3], tiles.shape[2]))
            modalities.append("text")
    return {"images": images, "image_sizes": sizes, "modalities": modalities}


def to_hf(batch: "Batch") -> dict[str, Tensor]:
    """The arguments of a model of transformers, under its names.

        input_ids, labels                    int64 [B, L]; an image's placeholders are as the loader's text made them
        attention_mask                       int64 [B, L], 1 where there is a token; and position_ids int64 [B, L] when packed
        pixel_values, by the fit:
            crop, pad, squash (LLaVA)        [images, 3, S, S]
            anyres (LLaVA-NeXT, OneVision)   [images, most tiles, 3, S, S], zeros behind an image's own; and image_sizes int64 [images, 2], (height,
                                             width) before fitting; with `pad_several` batch_num_images int64 [samples that have any]
            split (Idefics3, SmolVLM)        [B, most tiles of a row, 3, S, S], zeros behind a row's own; and pixel_attention_mask int64 [B, most
                                             tiles of a row, S, S], 0 there
            native (Qwen2-VL)                [patches, 3 * temporal_patch_size * patch_size ** 2]; and image_grid_thw int64 [images, 3]; with `ChatText`
                                             mm_token_type_ids int64 [B, L], 1 where a token stands for images

    Images are normalised to float32, unless they are normalised already (by `DevicePrefetcher`, in its type). A batch without any image has none
    of their keys. What text or images the batch does not have is left out.

    Raises:
        UsageError: images were not fitted by the loader.
    """
    result: dict[str, Tensor] = {}
    if batch.input_ids is not None and batch.attention_mask is not None and batch.labels is not None:
        result |= {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask.to(torch.int64),
            "labels": batch.labels,
        }
    if batch.position_ids is not None:
        result["position_ids"] = batch.position_ids
    if not len(batch.images):
        return result
    if batch.image_shapes is not None and isinstance(batch.images, torch.Tensor):
        patches, grid = batch.image_fit.to_patches(batch.images, batch.image_shapes)
        if not patches.is_floating_point():
            patches = _normalized_patches(batch, patches)
        if batch.input_ids is not None and batch.image_token_id is not None:
            result["mm_token_type_ids"] = (batch.input_ids == batch.image_token_id).to(torch.int64)
        return result | {"pixel_values": patches, "image_grid_thw": grid}
    images = _normalized(batch)
    if batch.image_tiles is None:
        return result | {"pixel_values": images}
    assert batch.image_sizes is not None
    if getattr(batch.image_fit, "fit", "") == "split":
        return result | _by_rows(batch, images)
    values = _stacked(images, batch.image_tiles)
    result |= {"pixel_values": values, "image_sizes": batch.image_sizes}
    if getattr(batch.image_fit, "pad_several", False):
        counts = torch.bincount(batch.image_samples)
        result["batch_num_images"] = counts[counts > 0]
    return result


def _by_rows(batch: "Batch", tiles: Tensor) -> dict[str, Tensor]:
    """The tiles of each row's images, and which of them there are."""
    assert batch.image_tiles is not None
    rows = int(batch.rows[-1]) + 1
    counts = torch.zeros(rows, dtype=torch.int64, device=tiles.device)
    counts.index_add_(0, batch.rows[batch.image_samples], batch.image_tiles)
    values = _stacked(tiles, counts)
    there = torch.arange(values.shape[1], device=tiles.device) < counts[:, None]
    mask = there[:, :, None, None].expand(-1, -1, *tiles.shape[2:]).to(torch.int64)
    return {"pixel_values": values, "pixel_attention_mask": mask}


def _stacked(tiles: Tensor, counts: Tensor) -> Tensor:
    """Groups of tiles behind one another, [sum of counts, ...], as [groups, largest count, ...], zeros behind each group's own."""
    most = int(counts.max())
    values = tiles.new_zeros(len(counts), most, *tiles.shape[1:])
    values[torch.arange(most, device=tiles.device) < counts[:, None]] = tiles
    return values


def _normalized(batch: "Batch") -> Tensor:
    """The images as the model takes them."""
    if not isinstance(batch.images, torch.Tensor):
        raise UsageError("these images are encoded: give the loader image=ImageTransform(...)")
    if batch.images.is_floating_point():
        return batch.images
    images: Tensor = batch.image_fit.normalize(batch.images, torch.float32)
    return images


def _normalized_patches(batch: "Batch", patches: Tensor) -> Tensor:
    # bytes are moved sooner than floats
    fit = batch.image_fit
    apart = patches.view(len(patches), 3, -1, fit.patch_size)
    normalized: Tensor = fit.normalize(apart, torch.float32).view(len(patches), -1)
    return normalized
