"""Opens any source of records."""

from shardify.sources.llava import RecordFile, split_records
from shardify.sources.spec import SourceSpec


def needs_spool(spec: SourceSpec) -> bool:
    """Whether the source cannot be read in place."""
    del spec
    return False


def open_source(spec: SourceSpec, *, spool: str) -> RecordFile:
    """Open a source."""
    del spool
    return split_records(spec.path, name=spec.name)
