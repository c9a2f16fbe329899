"""Ids of records as JSON text: which of them are equal."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PLAIN = r'^("[^"\\]*"|-?[0-9]+|null)$'  # equal texts are equal ids


def same_id(text: str | None) -> str:
    """One spelling for ids that are equal, however they are escaped: JSON text; ``null`` for none."""
    if text is None:
        return "null"
    if re.match(_PLAIN, text):
        return text
    try:
        plain = json.dumps(json.loads(text), ensure_ascii=False)
        plain.encode()
    except (ValueError, RecursionError):  # a lone surrogate stays as it is written
        return text
    return plain


def spelled_ids(column: pa.ChunkedArray) -> pa.Array:
    """`same_id` of each in a sidecar's column ``id``."""
    ids = pc.fill_null(column, "null").combine_chunks()
    odd = np.flatnonzero(~np.asarray(pc.match_substring_regex(ids, _PLAIN), np.bool_))
    if not len(odd):
        return ids
    spelled = ids.to_pylist()
    for row in odd.tolist():
        spelled[row] = same_id(spelled[row])
    return pa.array(spelled, pa.string())
