"""Sample bytes: local reads, byte ranges of remote shards, and the node's block cache between them and the workers.

local.py     reads of local shards
remote.py    RemoteFetch: what the trainer's process holds; CachedFetcher: what its workers read with
download.py  the download process of a rank: obstore, retries, deadlines
verify.py    whether what arrived is what was written
cache.py     the block cache: who may write what, what is kept, what goes
ledger.py    its book
"""

from loaders.fetch.local import LocalFetcher

__all__ = ["LocalFetcher"]
