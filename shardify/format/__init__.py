"""What is on disk: names, tar shards, sidecars, the index, the manifest. docs/format.md describes it all for other readers."""
