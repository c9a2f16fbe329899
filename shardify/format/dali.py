"""The index of NVIDIA DALI's WebDataset reader, as its tool wds2idx writes it (version 1.2).

v1.2 <samples>
<field> <offset of the data> <size> <member name>   ... once for each member of a sample, all on one line
"""

import os

import pyarrow.compute as pc

from shardify.errors import FormatError
from shardify.format.files import write_whole
from shardify.format.names import TAR, shard_stem
from shardify.format.sidecar import read_sidecar

_VERSION = "v1.2"


def write_dali(path: str, sidecar: str) -> str:
    """Write ``000.idx`` beside ``000.tar``, for ``fn.readers.webdataset(paths=["000.tar"], index_paths=["000.idx"])``.

    Args:
        path: the shard.
        sidecar: its Parquet file.

    Returns:
        The path of the index.

    Raises:
        FormatError: the shard is compressed or empty, a name in it has blanks, or the index cannot be written.
    """
    if not path.endswith(TAR):
        raise FormatError(f"{path}: DALI reads plain tars only")
    table = read_sidecar(sidecar, ("key", "members"))
    if not table.num_rows:
        raise FormatError(f"{path}: no samples; DALI refuses empty shards")
    ends = pc.list_value_length(table["members"]).to_numpy().cumsum().tolist()
    members = pc.list_flatten(table["members"]).combine_chunks()
    fields = members.field("field").to_pylist()
    offsets, sizes = members.field("offset").to_pylist(), members.field("size").to_pylist()
    lines = [f"{_VERSION} {table.num_rows}"]
    begin = 0
    for key, end in zip(table["key"].to_pylist(), ends, strict=True):
        parts = [f"{fields[n]} {offsets[n]} {sizes[n]} {key}.{fields[n]}" for n in range(begin, end)]
        if any(len(part.split()) != 4 or "\n" in part for part in parts):
            raise FormatError(
                f"{path}: sample {key!r} has blanks in its name, which DALI's index cannot hold"
            )
        lines.append(" ".join(parts))
        begin = end
    target = shard_stem(path) + ".idx"
    write_whole(target, ("\n".join(lines) + "\n").encode())
    return os.fspath(target)
