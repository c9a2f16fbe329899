"""SPDL with its threads in the consuming process: nothing has to be carried over, and in training they and the trainer share one GIL."""

from benchmarks.peers.spdl import PACKAGES, write
from benchmarks.peers.spdl import batches_in_process as batches

__all__ = ["PACKAGES", "batches", "write"]
