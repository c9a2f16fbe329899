"""The streaming loader: shards to exact, resumable batches for distributed training."""

from loaders.batch import Batch, SampleFault
from loaders.device import DevicePrefetcher
from loaders.image import ImageTransform
from loaders.loader import StreamingLoader
from loaders.report import LoaderReport
from loaders.stats import DeviceStats, LoaderStats
from loaders.text import LlavaText

__all__ = [
    "Batch",
    "DevicePrefetcher",
    "DeviceStats",
    "ImageTransform",
    "LlavaText",
    "LoaderReport",
    "LoaderStats",
    "SampleFault",
    "StreamingLoader",
]
