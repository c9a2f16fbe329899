"""Image tokens as the LLaVA models of transformers count them: one for each of an image's features."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loaders.batch import Batch
from loaders.text import IGNORE_INDEX, IMAGE_TOKEN


def expand_images(batch: Batch, *, image_token: int, tokens_per_image: int, max_length: int) -> Batch:
    """Replace each -200 by as many image tokens as an image has features.

        tokens of a row     images     with 3 features an image
        1 -200 7 8          a          1 I I I 7 8               a
        1 -200 9            b c        1 I I I 9 padding         b; no token asks for c

    A sample longer than `max_length` is cut there, or before the image that this would cut in two; images behind the cut are left out.

    Args:
        batch: with tokens of `LlavaText`, and fitted images.
        image_token: the model's, which stands for a feature.
        tokens_per_image: features of an image.
        max_length: tokens of a sample at most.
    """
    assert batch.input_ids is not None
    assert batch.labels is not None
    assert batch.attention_mask is not None
    assert isinstance(batch.images, Tensor)
    packed = batch.segment_ids is not None
    segments = batch.attention_mask.long() if batch.segment_ids is None else batch.segment_ids
    rows, wanted = [], []
    for row, columns in enumerate(
        zip(batch.input_ids, batch.labels, batch.attention_mask, segments, strict=True)
    ):
        is_image, begins = columns[0] == IMAGE_TOKEN, _begins(columns[3])
        repeats = torch.where(is_image, tokens_per_image, 1)
        ends = repeats.cumsum(0)
        kept = ends - torch.where(begins, ends - repeats, 0).cummax(0).values <= max_length
        rows.append([column[kept].repeat_interleave(repeats[kept]) for column in columns])
        samples = (batch.valid & (batch.rows == row)).nonzero().flatten().tolist()
        asked = columns[3][kept & is_image].bincount(minlength=len(samples) + 1)
        for sample, count in zip(samples, asked[1:].tolist(), strict=True):
            wanted.append((batch.image_samples == sample).nonzero().flatten()[:count])
    input_ids, labels, attention_mask, segments = (
        pad_sequence(list(column), batch_first=True, padding_value=padding)
        for column, padding in zip(zip(*rows, strict=True), (0, IGNORE_INDEX, False, 0), strict=True)
    )
    # where a text without image says "<image>", a tokenizer that has this token writes it; the model would look for an image
    written, begins = input_ids == image_token, _begins(segments)
    labels[written | begins | (input_ids == IMAGE_TOKEN)] = (
        IGNORE_INDEX  # nor is a sample foretold by the one before
    )
    input_ids[written] = 0
    input_ids[input_ids == IMAGE_TOKEN] = image_token
    length = int(attention_mask.any(0).nonzero().max()) + 1  # rows that grew may not have been the longest
    places = torch.arange(segments.shape[1]).expand_as(segments)
    positions = places - torch.where(begins, places, 0).cummax(1).values
    images = torch.cat(wanted) if wanted else torch.empty(0, dtype=torch.int64)
    every = len(images) == len(batch.images)
    return replace(
        batch,
        input_ids=input_ids[:, :length],
        labels=labels[:, :length],
        attention_mask=attention_mask[:, :length],
        position_ids=positions[:, :length] if packed else None,
        segment_ids=segments[:, :length] if packed else None,
        images=batch.images if every else batch.images[images],
        image_samples=batch.image_samples if every else batch.image_samples[images],
    )


def _begins(segments: Tensor) -> Tensor:
    """Where samples, and the padding, begin: bool [..., L]."""
    return segments.diff(prepend=segments.new_full((*segments.shape[:-1], 1), -1)) != 0
