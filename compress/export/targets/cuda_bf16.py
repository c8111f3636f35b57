"""The portable program in bfloat16, for any GPU; it is checked on the CPU, so that none is needed to build it."""

from __future__ import annotations

from functools import partial

import torch

from compress.export.targets.eager import build_in, requires

__all__ = ["CHECKED_BY", "EXACT", "FILE", "build", "requires"]

FILE = "program.cuda_bf16.pt2"
EXACT = False
CHECKED_BY = "eager"
build = partial(build_in, torch.bfloat16)
