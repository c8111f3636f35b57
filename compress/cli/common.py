"""What commands share."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from compress.errors import RecipeError, RunError

__all__ = ["check_writable", "no_more", "quiet"]


def no_more(command: str, rest: list[str]) -> None:
    """Refuse words that a command does not know.

    Raises:
        RecipeError: when there are any.
    """
    if rest:
        raise RecipeError(f"{command}: expected no more words, got {' '.join(rest)}. See 'compress {command} --help'.")


def quiet() -> None:
    """Keep other libraries' chatter away from what the user reads; they set their levels when they are imported."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "torchao", "torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not os.environ.get("WANDB_API_KEY"):
        os.environ.setdefault("WANDB_MODE", "offline")


def check_writable(option: str, file: str | None) -> None:
    """Refuse, before any work, a file that could not be written after it.

    Raises:
        RunError: when its folder is not there, or it is a folder itself.
    """
    if file is None:
        return
    path = Path(file)
    if (path.exists() and not path.is_file()) or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RunError(f"{option}: expected a file in a folder that can be written, got {file}. Make the folder.")
