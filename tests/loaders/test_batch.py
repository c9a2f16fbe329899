"""`Batch` and the report over batches."""

import copy
import logging
import pickle

import pytest
import torch

from loaders.batch import Batch, SampleFault
from loaders.report import MAX_FAULTS, LoaderReport


def batch(**changes):
    fields = {
        "keys": ["000000001", ""],
        "positions": torch.tensor([4, -1]),
        "valid": torch.tensor([True, False]),
        "rows": torch.arange(2),
        "input_ids": torch.tensor([[1, 2], [0, 0]]),
        "images": torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        "image_samples": torch.tensor([0]),
        "state": {"epoch": 0},
        **changes,
    }
    return Batch(**fields)


def tensors(of):
    return {name: value for name in Batch.__slots__ if isinstance(value := getattr(of, name), torch.Tensor)}


def test_to_moves_every_tensor_and_keeps_the_rest():
    here = batch()
    there = here.to("meta")
    assert {value.device.type for value in tensors(there).values()} == {"meta"}
    assert tensors(there).keys() == tensors(here).keys()
    assert (there.keys, there.state, there.labels, there.records) == (here.keys, here.state, None, None)
    assert {value.device.type for value in tensors(here).values()} == {"cpu"}


def test_encoded_images_stay_bytes():
    assert batch(images=[b"a"]).to("meta").images == [b"a"]


def test_a_copy_of_views_has_bytes_of_its_own():
    memory = bytearray(b"abcd")
    here = batch(images=[memoryview(memory)[:1], memoryview(memory)[1:]])
    for copied in (pickle.loads(pickle.dumps(here)), copy.deepcopy(here)):
        memory[0] = ord("x")
        assert copied.images[1] == b"bcd"
        assert {type(image) for image in copied.images} == {bytes}


def test_a_copy_elsewhere_leaves_the_slab_alone():
    here = batch(_copied=print)
    assert here.to("meta")._copied is None
    assert here.to("cpu")._copied is print  # the same memory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_copy_to_the_device_is_recorded():
    events = []
    moved = batch(_copied=events.append).to("cuda")
    torch.cuda.synchronize()
    assert [event.query() for event in events] == [True]
    assert moved.images.is_cuda


def fault(position, code="image-undecodable"):
    return SampleFault(position, f"{position:09d}", "data/000.tar", 512 * position, code, "a cut")


def test_the_report_lists_a_bounded_number_and_counts_all(caplog):
    report = LoaderReport()
    with caplog.at_level(logging.WARNING, "loaders"):
        for step in range(3):
            report.add(
                samples=5, faults=[fault(i) for i in range(600)], notes=["odd", "odd"], overflowed=step > 1
            )
        report.add(samples=1, faults=[fault(0, "shard-read-error")], notes=[], overflowed=False)
    assert (report.batches, report.samples, report.overflowed) == (4, 16, 1)
    assert report.faults == {"image-undecodable": 1800, "shard-read-error": 1}
    assert report.notes == {"odd": 6}
    assert len(report.listed) == MAX_FAULTS
    assert [entry.getMessage().split(" (")[0] for entry in caplog.records] == [
        "sample left out: image-undecodable",
        "sample left out: shard-read-error",
    ]
    assert "data/000.tar offset 0, key 000000000" in caplog.text
