"""The streaming loader: shards to exact, resumable batches for distributed training."""

from loaders.batch import Batch, SampleFault
from loaders.image import ImageTransform
from loaders.loader import StreamingLoader
from loaders.report import LoaderReport
from loaders.text import LlavaText

__all__ = ["Batch", "ImageTransform", "LlavaText", "LoaderReport", "SampleFault", "StreamingLoader"]
