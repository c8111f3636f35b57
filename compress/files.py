"""Files that appear whole or not at all: written under a temporary name, then given their own."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

__all__ = ["replacing", "write_json", "write_text"]

_ABANDONED = 3600  # seconds


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name in a file's folder; what is written there becomes the file at the end, unless that fails.

    Of processes that write the same file at once, the last to end has it. What one that was killed has left goes when
    the file is written an hour later or more.

    Args:
        path: The file; its folder is there.
    """
    path = Path(path)
    _clear(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _clear(path: Path) -> None:
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file of text, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a file of JSON."""
    write_text(path, json.dumps(content, indent=1))
