"""Which kinds of values a manifest may hold: checked before anything is made of them, here or by who reads it."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any

__all__ = ["check_content", "check_kinds", "check_target"]

_Kinds = Mapping[str, type | UnionType]

_CONTENT: _Kinds = {
    **dict.fromkeys(("name", "created", "task"), str),
    **dict.fromkeys(("inputs", "outputs", "history"), list),
    **dict.fromkeys(("targets", "metrics", "versions", "skipped"), dict),
}
_MORE_CONTENT: _Kinds = {
    "structure": str | None,
    "labels": list | None,
    "preprocessing": dict | None,
    "scheme": str | None,
    "max_batch": int | None,
    "products": list,
    **dict.fromkeys(("cleanup", "agreement", "gates", "files"), dict),
}
_TARGET: _Kinds = {
    **dict.fromkeys(("file", "sha256"), str),
    **dict.fromkeys(("census", "agreement", "requires"), dict),
    "bytes": int,
}
_MORE_OF_TARGET: _Kinds = dict.fromkeys(("parts", "options"), dict)
_EDIT: _Kinds = {"kind": str}
_MORE_OF_EDIT: _Kinds = {"data": dict}
_PRODUCT: _Kinds = {"name": str, "macs": int, "quantized": bool}
_MORE_OF_PRODUCT: _Kinds = {"of_activations": bool}
_CENSUS: _Kinds = dict.fromkeys(("int8_kernels", "float_kernels"), int)
_MORE_OF_CENSUS: _Kinds = {"details": dict, "conversions": int | None, **dict.fromkeys(("int8_macs", "macs"), int)}


def check_content(content: Mapping[str, Any]) -> None:
    """Make sure that a manifest's entries are of the kinds that they must be, inside of those that only export reads.

    Args:
        content: Of the file.

    Raises:
        TypeError: when one is not; ``KeyError`` when one is missing, ``ValueError`` when it cannot be.
    """
    check_kinds(content, _CONTENT, _MORE_CONTENT)
    if content.get("max_batch") is not None and content["max_batch"] < 1:
        raise ValueError(f"max_batch {content['max_batch']}")
    if not all(isinstance(label, str) for label in content.get("labels") or []):
        raise TypeError("labels are not all of type str")
    for edit in content["history"]:
        check_kinds({"an edit of history": edit}, {"an edit of history": dict})
        check_kinds(edit, _EDIT, _MORE_OF_EDIT)
    for product in content.get("products", []):
        _check_record("a product", product, _PRODUCT, _MORE_OF_PRODUCT)
    for key, kind in {"gates": int | float, "files": str}.items():
        check_kinds(content.get(key, {}), dict.fromkeys(content.get(key, {}), kind))


def check_target(target: Mapping[str, Any]) -> None:
    """Make sure that a target's entries are of the kinds that they must be; raises as ``check_content`` does.

    Args:
        target: One of a manifest's.
    """
    check_kinds(target, _TARGET, _MORE_OF_TARGET)
    check_kinds(target.get("parts", {}), dict.fromkeys(target.get("parts", {}), str))
    if target["census"]:
        _check_record("a census", target["census"], _CENSUS, _MORE_OF_CENSUS)
    _check_requires(target["requires"])


def check_kinds(content: Mapping[str, Any], kinds: _Kinds, optional: _Kinds | None = None) -> None:
    """Make sure that values are of the kinds that they must be.

    Args:
        content: Values by name; others than those named may be there, too.
        kinds: Of values that must be there.
        optional: Of values that may be missing.

    Raises:
        TypeError: when one is not; ``KeyError`` when one is missing.

    Example:
        >>> check_kinds({"bytes": "many"}, {"bytes": int})
        Traceback (most recent call last):
        ...
        TypeError: bytes is of type str
    """
    present = {key: kind for key, kind in (optional or {}).items() if key in content}
    for key, kind in {**kinds, **present}.items():
        if not isinstance(content[key], kind):
            raise TypeError(f"{key} is of type {type(content[key]).__name__}")


def _check_record(what: str, content: Any, kinds: _Kinds, optional: _Kinds) -> None:
    """Make sure that a value holds what it must, and nothing else."""
    check_kinds({what: content}, {what: dict})
    if unknown := sorted(content.keys() - kinds.keys() - optional.keys()):
        raise ValueError(f"{what} with {', '.join(unknown)}")
    check_kinds(content, kinds, optional)


def _check_requires(requires: Mapping[str, Any]) -> None:
    kinds = {"flags": list, "versions": dict, **dict.fromkeys(("system", "arch", "torch", "cuda"), str)}
    check_kinds(requires, {}, kinds)
    words = [*requires.get("flags", []), *requires.get("versions", {}), *requires.get("versions", {}).values()]
    if not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"requirements {words}")
