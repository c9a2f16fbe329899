"""Building batches: what two ways of reading the same batch leave in it."""

from loaders import StreamingLoader, build
from loaders.fetch import LocalFetcher
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
