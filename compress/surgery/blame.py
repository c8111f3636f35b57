"""Which layer of a network, and which line of its code, ``torch.export`` stumbled on."""

from __future__ import annotations

import inspect
import re

from torch import nn

__all__ = ["layer_and_line"]

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)[^\n]*\n\s*(?P<code>\S[^\n]*)', re.MULTILINE)


def layer_and_line(network: nn.Module, error: Exception) -> str:
    """Return `` in 'LAYER' (CLASS) at FILE:LINE: CODE``, as much of it as is known.

    Torch's message ends with the user's calls. The layer is the one in whose methods the innermost of these lies; of
    several of one class, which a message does not tell apart, the first.

    Args:
        network: What was captured.
        error: From ``torch.export``.
    """
    frames = [(found["file"], int(found["line"]), found["code"]) for found in _FRAME.finditer(str(error))]
    own = [frame for frame in frames if "site-packages/torch/" not in frame[0]]
    place = " at {}:{}: {}".format(*own[-1]) if own else ""
    for file, line, _ in reversed(frames):
        found = [(name, module) for name, module in network.named_modules() if _has(type(module), file, line)]
        if found:
            name, module = found[0]
            alike = f", the first of {len(found)}" if len(found) > 1 else ""
            return (f" in {name!r} ({type(module).__name__}{alike})" if name else "") + place
    return place


def _has(kind: type, file: str, line: int) -> bool:
    """Say whether a line belongs to a method of a class, other than those of every module."""
    methods = [value for base in kind.__mro__ if base not in nn.Module.__mro__ for value in vars(base).values()]
    codes = [inspect.unwrap(method).__code__ for method in methods if inspect.isfunction(method)]
    return any(
        code.co_filename == file and code.co_firstlineno <= line <= max(last or 0 for *_, last in code.co_lines())
        for code in codes
    )
