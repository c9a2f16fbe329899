"""Other captions for the images of a source: LLaVA-CC3M's metadata.json has BLIP's beside the raw ones."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import xxhash

from shardify.errors import RecordError, SourceError
from shardify.prepare import prepare
from shardify.records import MAX_RECORD_BYTES, load_record
from shardify.sources.llava import RecordFile, open_unchanged
from shardify.sources.spec import Captions
from shardify.sources.spool import Spool

CAPTION_KEPT = "caption-kept"


def read_captions(captions: Captions, file: RecordFile) -> dict[str, str]:
    """Image name -> caption, of the entries that have one.

    Args:
        captions: which fields say so.
        file: the entries.

    Raises:
        SourceError: no entry names an image.
    """
    found: dict[str, str] = {}
    named = 0
    for raw in _raw_records(file):
        try:
            entry = load_record(raw)
        except RecordError:
            continue  # the record it is for keeps its own
        name, caption = entry.get(captions.key), entry.get(captions.field)
        if isinstance(name, str):
            named += 1
            if isinstance(caption, str) and caption.strip():
                found[name] = caption
    if not named:
        raise SourceError(
            f"{captions.path}: no entry has the text {captions.key!r}, which should name the image of a caption"
        )
    return found


def replace_captions(
    file: RecordFile, captions: Mapping[str, str], spool: Spool, *, fingerprint: str
) -> RecordFile:
    """Spool the records of a source with other captions.

    The last answer of a record with one image becomes the image's caption: that of its path, or of the path's last part. Records without one
    keep theirs and get the note ``caption-kept``; records that cannot be read, or have no image, stay as they are.

    Args:
        file: the records.
        captions: image name -> caption.
        spool: takes all records.
        fingerprint: of what the captions came from, which becomes part of the source's own.

    Raises:
        SourceError: the record file has changed.
    """
    for raw in _raw_records(file):
        try:
            prepared = prepare(raw)
        except RecordError:
            spool.add(raw)
            continue
        if not prepared.sample.images:
            spool.add(raw)
            continue
        path = prepared.sample.images[0].path
        caption = captions.get(path) or captions.get(os.path.basename(path))
        record = load_record(prepared.raw)
        answers = [turn for turn in record["conversations"] if turn["from"] == "gpt"]
        if caption is None or not answers or len(prepared.sample.images) > 1:
            spool.add(raw, notes=(CAPTION_KEPT,))
            continue
        answers[-1]["value"] = caption
        spool.add_record(record, notes=prepared.notes)
    new = spool.finish()
    both = xxhash.xxh3_128_hexdigest(f"{file.fingerprint} {fingerprint}".encode())
    notes = dict(file.notes) | dict(new.notes)
    return replace(new, fingerprint=both, embedded=file.embedded, notes=notes)


def _raw_records(file: RecordFile) -> Iterator[bytes]:
    descriptor = open_unchanged(file.path, file.stamp)
    try:
        for offset, length in zip(file.offsets.tolist(), file.lengths.tolist(), strict=True):
            yield os.pread(descriptor, min(length, MAX_RECORD_BYTES + 1), offset)
    finally:
        os.close(descriptor)
