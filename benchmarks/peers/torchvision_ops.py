"""Lets torchvision be imported beside a torch without CUDA.

MosaicML Streaming and litData import torchvision, whose wheel on PyPI is built against CUDA; where its operators cannot be loaded, two of
them are missed on import. Nothing of torchvision is called here.
"""

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")  # declarations last as long as it does
try:
    import torchvision  # noqa: F401
except RuntimeError:
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
