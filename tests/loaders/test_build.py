"""Building batches: what two ways of reading the same batch leave in it."""

import pytest

from loaders import ImageTransform, LlavaText, StreamingLoader, build
from loaders.fetch import LocalFetcher
from loaders.text import ByteTokenizer
from shardify.errors import SampleError


def test_a_batch_that_is_read_again_keeps_nothing_of_the_first_time(plain_data, monkeypatch):
    """Bytes are passed on as they are until something is out of the ordinary; a sample that then fails is a filler like all others."""
    is_image_field, read_into = build.is_image_field, LocalFetcher.read_into
    asked, reads = [], []

    def forgetful(field):
        asked.append(field)
        return len(asked) != 3 and is_image_field(field)

    def failing(self, *arguments):
        begins, errors = read_into(self, *arguments)
        reads.append(arguments)
        if len(reads) == 2:
            errors[0] = SampleError("shard-read-error", "Input/output error")
        return begins, errors

    monkeypatch.setattr(build, "is_image_field", forgetful)
    monkeypatch.setattr(LocalFetcher, "read_into", failing)
    loader = StreamingLoader(plain_data, batch_size=8, shuffle=None, num_workers=0)
    batch = next(iter(loader))
    assert len(reads) == 2
    assert batch.keys == ["", *(f"{number:09}" for number in range(1, 8))]
    assert batch.valid.tolist() == [False] + [True] * 7
    assert [fault.code for fault in batch.faults] == ["shard-read-error"]


@pytest.mark.parametrize("there, named", [(0, 1), (1, 2), (2, 1), (1, 0)])
def test_a_sample_with_other_images_than_its_record_names_is_a_filler(tmp_path, made, there, named):
    """Else a model would see the images of its neighbours, or a token for none."""
    images = [made.png(number) for number in range(there)]
    samples = [made.ordinary(0), made.Made(images, made.record(1, named)), made.ordinary(2)]
    data = made.write(tmp_path / "data", samples, shards=1)
    text = LlavaText(ByteTokenizer(), template="v1")
    loader = StreamingLoader(
        data, batch_size=3, image=ImageTransform(8), text=text, shuffle=None, num_workers=0
    )
    batch = next(iter(loader))
    assert batch.valid.tolist() == [True, False, True]
    assert batch.image_samples.tolist() == [0, 2]
    assert [(fault.code, fault.detail) for fault in batch.faults] == [
        ("images-not-as-recorded", f"{there} images, and the record names {named}")
    ]
