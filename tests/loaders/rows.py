"""Batches of a few tokens for tests of what is done to them."""

import itertools
from dataclasses import replace

import torch

from loaders import Batch
from loaders.training import expand_images

IMAGE = 259  # the image token of train.py's tiny model


def make_batch(rows, image_samples=(), side=56):
    """Rows of tokens; everything from 7 on is trained on."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    count = len(rows)
    return Batch(
        keys=[str(row) for row in range(count)],
        positions=torch.arange(count),
        valid=torch.ones(count, dtype=torch.bool),
        rows=torch.arange(count),
        input_ids=ids,
        labels=torch.where(ids >= 7, ids, -100),
        attention_mask=torch.tensor([[column < len(row) for column in range(length)] for row in rows]),
        images=torch.arange(len(image_samples), dtype=torch.uint8)[:, None, None, None].expand(
            -1, 3, side, side
        ),
        image_samples=torch.tensor(image_samples, dtype=torch.int64),
        state={},
    )


def make_packed(rows, image_samples=()):
    """Rows of samples of tokens."""
    batch = make_batch([list(itertools.chain(*row)) for row in rows], image_samples)
    samples = [(row, sample) for row, packed in enumerate(rows) for sample in packed]
    segments = torch.zeros_like(batch.input_ids)
    for row, packed in enumerate(rows):
        numbers = [number for number, sample in enumerate(packed, 1) for _ in sample]
        segments[row, : len(numbers)] = torch.tensor(numbers)
    return replace(
        batch,
        keys=[str(number) for number in range(len(samples))],
        positions=torch.arange(len(samples)),
        valid=torch.ones(len(samples), dtype=torch.bool),
        rows=torch.tensor([row for row, _ in samples]),
        segment_ids=segments,
        position_ids=segments,  # made anew
    )


def expand(batch, *, tokens_per_image=3, max_length=100):
    return expand_images(batch, image_token=IMAGE, tokens_per_image=tokens_per_image, max_length=max_length)
