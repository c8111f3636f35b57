"""Networks under ``torch.compile``: edits reach the module inside, and what was compiled for the old one is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from compress.surgery.capture import Captured

if TYPE_CHECKING:
    import pytorch_lightning as pl

__all__ = ["drop_compiled", "inside", "original", "successor"]


def original(module: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper, or the module itself.

    Example:
        >>> network = nn.Linear(3, 2)
        >>> original(torch.compile(network)) is network
        True
    """
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def inside(module: nn.Module) -> str:
    """Return what the wrapper puts before the names of parameters: ``"_orig_mod."``, or nothing."""
    return "_orig_mod." if isinstance(module, OptimizedModule) else ""


def successor(owner: nn.Module, holder: nn.Module, edited: nn.Module) -> nn.Module:
    """Return what takes the place of a network after an edit, compiled as the network was.

    Args:
        owner: The module that holds the network; it may be compiled as a whole.
        holder: What it holds: a network, or ``torch.compile``'s wrapper of one.
        edited: The network after the edit: the same object, or another one such as a captured graph.

    Returns:
        ``edited``, in a wrapper if ``holder`` is one, so that names of parameters stay.
    """
    if edited is original(holder):
        return holder
    compile = _compiler(owner, holder)
    if compile is not None:
        if isinstance(edited, Captured):
            edited.compile_with(compile)
        elif not isinstance(holder, OptimizedModule) and holder._compiled_call_impl is not None:
            edited._compiled_call_impl = compile(edited._call_impl)
    if not isinstance(holder, OptimizedModule):
        return edited
    wrapper = holder.dynamo_ctx(edited)
    if isinstance(edited, Captured):
        wrapper.forward = edited.__call__  # it compiles its graph itself, one for each mode
    return wrapper


def drop_compiled(pl_module: pl.LightningModule) -> None:
    """Have everything compiled anew at its next call, where a module has anything compiled.

    Guards would notice the new shapes, too, but each edit would count as one of the few recompilations that a function
    is allowed before it runs uncompiled for good.
    """
    if pl_module._compiler_ctx is not None or any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None for module in pl_module.modules()
    ):
        torch.compiler.reset()


def _compiler(owner: nn.Module, holder: nn.Module) -> Callable[..., Any] | None:
    """Return what compiles with the user's own backend and options."""
    if isinstance(holder, OptimizedModule):
        return holder.dynamo_ctx
    if holder._compiled_call_impl is not None:  # by holder.compile(...)
        return _context(holder._compiled_call_impl)
    context = getattr(owner, "_compiler_ctx", None)  # by trainer.fit(torch.compile(module))
    return context["dynamo_ctx"] if context is not None else None


def _context(compiled: Any) -> Callable[..., Any]:
    # PyTorch has no way to ask a compiled function for its options; the context that made it is in its closure.
    cells = [cell.cell_contents for cell in compiled.__closure__ or ()]
    return next((content for content in cells if hasattr(content, "compiler_config")), torch.compile)
