"""Batches that a user keeps: they never change, and nobody waits for them."""

import pytest
import torch

from loaders import ImageTransform, LlavaText, StreamingLoader
from loaders.text import ByteTokenizer

TENSORS = ("images", "image_samples", "input_ids", "labels", "attention_mask", "positions", "rows", "valid")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [10, 1], ids=["every-10th", "all"])
def test_what_is_held_for_an_epoch_stays_as_it_was(plain_data, workers, every):
    loader = StreamingLoader(
        plain_data,
        batch_size=2,
        image=ImageTransform(8),
        text=LlavaText(ByteTokenizer()),
        num_workers=workers,
    )
    slabs = 2 * max(workers, 1) + 4  # prefetch times workers, and some to spare
    held, copies = [], []
    for epoch in range(3):
        for number, batch in enumerate(loader):
            if epoch == 0 and number % every == 0:
                held.append(batch)
                copies.append({name: getattr(batch, name).clone() for name in TENSORS})
    assert len(held) == -(-52 // every)
    for batch, copied in zip(held, copies, strict=True):
        assert all(torch.equal(getattr(batch, name), copied[name]) for name in TENSORS)
    # instead of waiting for slabs that are held, batches were built in ordinary memory
    before = loader.report().overflowed
    if every == 1:
        assert before >= 3 * 52 - 51 - slabs
    del batch, held
    for _ in range(3):
        for _ in loader:
            pass
    assert loader.report().overflowed - before <= slabs  # planned before the slabs were given back
    loader.close()
