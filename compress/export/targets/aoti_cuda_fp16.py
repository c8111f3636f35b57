"""A package compiled by AOTInductor for the GPU of this machine, in float16."""

from __future__ import annotations

from functools import partial

import torch

from compress.export.targets.aoti_cuda import build_in, requires

__all__ = ["EXACT", "FILE", "build", "requires"]

FILE = "model.aoti_cuda_fp16.pt2"
EXACT = False
build = partial(build_in, torch.float16)
