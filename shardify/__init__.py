"""shardify: image + conversation data sets become WebDataset tar shards."""

from shardify._version import __version__

__all__ = ["__version__"]
