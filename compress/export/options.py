"""What a target may be told beyond the network: the keyword-only arguments of its ``build``."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any

from compress.export.targets import TARGETS

__all__ = ["Options", "option_mistakes"]

Options = Mapping[str, Mapping[str, Any]]
"""Options by target, as ``{"aoti": {"max_autotune": True}}``."""


def option_mistakes(options: Options, targets: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with options, in words.

    Args:
        options: By target.
        targets: Keys of ``TARGETS`` that are built.

    Example:
        >>> list(option_mistakes({"aoti": {"tune": 1}}, ["aoti"]))
        ['options.aoti: expected options among max_autotune, got tune. Leave it out.']
    """
    for target, given in options.items():
        where = f"options.{target}"
        if target not in targets:
            yield f"{where}: expected a target among {', '.join(targets)}, got another. Add it, or leave this out."
            continue
        known = _known(target)
        for name, value in given.items():
            if name not in known:
                among = f"options among {', '.join(known)}" if known else "no options"
                yield f"{where}: expected {among}, got {name}. Leave it out."
            elif type(value) is not known[name]:
                yield f"{where}.{name}: expected a value of type {known[name].__name__}, got {value!r}. Change it."


def _known(target: str) -> dict[str, type]:
    signature = inspect.signature(import_module(TARGETS[target]).build, eval_str=True)
    return {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
