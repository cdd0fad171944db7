"""torchvision as published is built for CUDA. Beside a torch for CPUs its operators do not load, and then neither does
anything that imports it; but the tests call none of them, so it is enough to say what they would look like."""

from __future__ import annotations

import subprocess
import sys

import torch

if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
    OPERATORS = torch.library.Library("torchvision", "DEF")  # its definitions live as long as it does
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
