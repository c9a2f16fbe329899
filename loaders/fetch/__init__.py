"""Sample bytes: local reads, byte ranges of remote shards, and the node's block cache between them and the workers.

local.py     reads of local shards
remote.py    RemoteFetch, in the trainer's process, and CachedFetcher, in its workers
shared.py    what these and the download process share: counters, messages
download.py  the download process of a rank: what is fetched when
extents.py   one extent: fetched, checked, written as a block
requests.py  repetitions, pauses, deadlines
verify.py    whether what arrived is what was written
cache.py     the node's blocks: who fetches one, what is kept, what goes
folder.py    where they lie, and when a temporary folder goes
blocks.py    what is in a block's file
"""

from loaders.fetch.local import LocalFetcher
from loaders.fetch.remote import CachedFetcher, RemoteFetch
from loaders.fetch.shared import FetchCounters

__all__ = ["CachedFetcher", "FetchCounters", "LocalFetcher", "RemoteFetch"]
