"""The one exception hierarchy of shardify and loaders.

A message says what was wrong, where (file, record, shard, offset) and what to do. The command line prints it without a traceback and
exits with `exit_status`.
"""


class ShardifyError(Exception):
    """Base of everything raised on purpose."""

    exit_status = 1  # the data or the run failed


class UsageError(ShardifyError):
    """Options or arguments that cannot be honoured: nothing was attempted."""

    exit_status = 2


class SourceError(ShardifyError):
    """A record file or an image store cannot be read as what it should be."""


class FormatError(ShardifyError):
    """A shard, sidecar, index or manifest is missing, damaged, or belongs to something else."""


class PackError(ShardifyError):
    """Packing stopped: too many records set aside, a fault under `--on-bad fail`, or a lost worker."""


class StateError(ShardifyError):
    """A loader state that belongs to other shards or another order."""


class LoaderError(ShardifyError):
    """The loader cannot go on: a worker died."""


class SampleError(ShardifyError):
    """One record or image cannot be used.

    Attributes:
        code: the reason code, stable and machine-readable, such as ``image-missing``.
        detail: what was seen, for people.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # exceptions pickle by their `args`, which hold the joined message; workers send the parts
        return type(self), (self.code, self.detail)


class RecordError(SampleError):
    """A record that cannot be packed or read."""


class ImageError(SampleError):
    """Image bytes that cannot be used."""


class TextError(SampleError):
    """A conversation that a template cannot take; `code` is the reason."""
