"""Contenders of the loading benchmarks, each a process of its own that can be stopped and continued.

One module for each loader, with `PACKAGES`, `write(shards, folder)`, which makes its own data set of the same samples, and
`batches(folder, picture, workers)`, which yields batches without end, all epochs as one: (uint8 [n, 3, 336, 336], n records), or
with `picture` None (n encoded images, n records).
"""

BATCH = 64
