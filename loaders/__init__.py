"""The streaming loader: shards to exact, resumable batches for distributed training."""

from loaders.batch import Batch, SampleFault
from loaders.build import Sample
from loaders.device import DevicePrefetcher
from loaders.image import ImageTransform
from loaders.loader import StreamingLoader
from loaders.mixture import Mixture
from loaders.report import LoaderReport
from loaders.stats import DeviceStats, LoaderStats
from loaders.text import ChatText, LlavaText

__all__ = [
    "Batch",
    "ChatText",
    "DevicePrefetcher",
    "DeviceStats",
    "ImageTransform",
    "LlavaText",
    "LoaderReport",
    "LoaderStats",
    "Mixture",
    "Sample",
    "SampleFault",
    "StreamingLoader",
]
