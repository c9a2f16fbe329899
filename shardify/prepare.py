"""From a record's bytes to what is packed of it: its own bytes, or, for a record in another schema, LLaVA's form of it. Pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from shardify.errors import RecordError
from shardify.records import MAX_RECORD_BYTES, Sample, load_record, parse_record
from shardify.schema import HINTS, to_llava


@dataclass(frozen=True, slots=True)
class Prepared:
    """A record as it will be packed.

    Attributes:
        sample: what it says.
        raw: the JSON member's bytes.
        notes: codes of what was changed.
    """

    sample: Sample
    raw: bytes
    notes: tuple[str, ...] = ()


def prepare(raw: bytes, *, outline: bool = False) -> Prepared:
    """Read a record; one in another schema is rewritten in LLaVA's.

    Args:
        raw: the record's bytes.
        outline: see `parse_record`.

    Raises:
        RecordError: with the reason code; never anything else for any bytes.
    """
    try:
        sample = parse_record(raw, outline=outline)
    except RecordError as error:
        changed = _change(raw)
        if changed is None:
            raise error from None
        return changed
    # a record with images has nothing left to look for; most others lack the hints
    return (None if sample.images else _change(raw)) or Prepared(sample, raw)


def _change(raw: bytes) -> Prepared | None:
    """The record in LLaVA's schema; None when it is in no other."""
    if len(raw) > MAX_RECORD_BYTES or not any(hint in raw for hint in HINTS):
        return None
    try:
        changed = to_llava(load_record(raw))
    except RecordError as error:
        if error.code in ("record-not-json", "record-not-object"):
            return None
        raise
    if changed is None:
        return None
    record, notes = changed
    data = encode_record(record)
    return Prepared(parse_record(data), data, notes)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A record as JSON; what a tolerant reader took in (NaN, a lone surrogate, an integer of any size) stays as it came.

    Raises:
        RecordError: ``record-not-json``: it is nested as deeply as can be read, and too deeply to be written.
    """
    try:
        try:
            data = msgspec.json.encode(record)
        except (UnicodeError, OverflowError, msgspec.MsgspecError):
            return json.dumps(record, separators=(",", ":")).encode()
        # msgspec writes null for NaN: of all that holds a null, the other writer knows
        if b"null" in data:
            data = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    except (RecursionError, ValueError) as error:
        raise RecordError("record-not-json", f"it cannot be written again ({error})") from None
    return data
