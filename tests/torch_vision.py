"""Imports torchvision, on which timm and the image models of transformers stand, whichever build of it there is.

Its packaged library, built for CUDA, cannot be loaded beside a CPU torch. Importing it then fails on two operators that
nothing here needs; with these declared it works.
"""

import sys
import warnings

import torch

_operators = []  # kept: they are undeclared with their last reference

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _operators.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _operators[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
