"""Other libraries, imported with what they are known to lack."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["import_library", "mend_torchvision"]

# Of those that recipes name, the ones that import torchvision where it is installed.
_WITH_TORCHVISION = ("torchvision", "timm", "transformers")
_declared: list[Any] = []


def import_library(name: str) -> ModuleType:
    """Import a module of another library by its dotted name; torchvision is mended first where that is needed.

    Raises:
        Exception: whatever the import raises.
    """
    if name.partition(".")[0] in _WITH_TORCHVISION:
        mend_torchvision()
    return import_module(name)


def mend_torchvision() -> None:
    """Make torchvision importable where only its compiled operators are missing; nothing happens where it is absent.

    PyPI's torchvision is built against CUDA. Beside a torch for the CPU its operators do not load, and then importing
    it fails, because it describes two of them (``nms`` and ``qnms``) to torch without looking whether they are there;
    with it fail torchmetrics, Lightning and transformers, which import it. No classifier needs these two: they are
    declared, without code, and the import is tried once more. In Python, call this before importing Lightning, or
    install the torchvision that belongs to your torch.

    Raises:
        Exception: whatever the import raises for any other reason.
    """
    if _declared or find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _declare_operators()
        import_module("torchvision")


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)  # the operators would go with it
