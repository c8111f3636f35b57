"""What Inductor compiles for the GPU of this machine, called from Python, in bfloat16."""

from __future__ import annotations

from functools import partial

import torch

from compress.export.targets.inductor_cuda import build_in, requires

__all__ = ["EXACT", "FILE", "build", "requires"]

FILE = "model.inductor_cuda_bf16.pt"
EXACT = False
build = partial(build_in, torch.bfloat16)
