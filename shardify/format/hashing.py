"""The hash of a whole file, as manifests and sidecars record it."""

import os

import xxhash

MAX_HASHED_BYTES = 256 * 1000**2
"""What is hashed in passing, in a tenth of a second; a larger file is `shardify verify`'s to check."""

_CHUNK = 4 * 1024 * 1024


def hash_file(path: str | os.PathLike[str]) -> str:
    """xxh3_128 of a file's content, hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
