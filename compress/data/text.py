"""Texts as tokens of a fixed length, made in training as the artefact will make them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import ArtifactError, DataError, MissingPackageError
from compress.libraries import import_library
from compress.runtime.text import make_encoder

__all__ = ["Tokenizer"]

_FILE = "tokenizer.json"


class Tokenizer:
    """Turns texts into a network's inputs.

    A data module that tokenises by it hands ``preprocessing`` and ``files`` over to the artefact, as its attributes
    ``preprocessing`` and ``preprocessing_files``; the artefact then predicts texts.

    Args:
        name: Folder or name on the hub of a Hugging Face tokenizer, which ``transformers`` reads; or a ``.json`` file
            of the library ``tokenizers`` that says how it pads, which is read without ``transformers``.
        length: Tokens of each text; longer ones are cut, shorter ones filled up.
        inputs: What each of the network's inputs takes, in order: ``ids``, ``mask`` (1 where a token counts, 0 where it
            only fills) or ``type_ids``.

    Raises:
        DataError: when there is no such tokenizer, or it has nothing to fill up with.
        MissingPackageError: when ``transformers`` or ``tokenizers`` is not installed.
    """

    def __init__(self, name: str, length: int, *, inputs: Sequence[str] = ("ids", "mask")) -> None:
        found = _read_file(Path(name)) if name.endswith(".json") else _from_transformers(name)
        self.files = {_FILE: found.content}
        self.preprocessing: dict[str, Any] = {
            "tokenizer": _FILE,
            "length": length,
            "padding": found.padding,
            "truncation": {"side": found.truncation},
            "inputs": list(inputs),
        }
        try:
            self._encode = make_encoder(found.content, self.preprocessing)
        except ArtifactError as error:
            raise _mistake(name, error) from error

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return a tensor for each input, int64, shape (N, length)."""
        return tuple(torch.from_numpy(array) for array in self._encode(texts))


class _Found(NamedTuple):
    content: str
    padding: dict[str, Any]
    truncation: str


def _read_file(file: Path) -> _Found:
    try:
        content = file.read_text(encoding="utf-8")
        said = json.loads(content)
        padding, truncation = said["padding"], said["truncation"] or {}
        if padding is None:
            raise ValueError("one that does not say how it pads: call its enable_padding and save it again")
        steps = {
            "token": padding["pad_token"],
            "id": padding["pad_id"],
            "type_id": padding["pad_type_id"],
            "side": padding["direction"].lower(),
        }
        return _Found(content, steps, truncation.get("direction", "Right").lower())  # old files do not say
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _mistake(str(file), error) from error


def _from_transformers(name: str) -> _Found:
    try:
        transformers = import_library("transformers")
    except ModuleNotFoundError as error:
        raise MissingPackageError("transformers", "zoo") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _mistake(name, error) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.pad_token_id is None:
        what = "without a padding token" if backend is not None else "that only transformers can run"
        raise DataError(
            f"data.tokenizer: expected a fast tokenizer with a padding token, got {name!r}, one {what}. Save another."
        )
    steps = {
        "token": tokenizer.pad_token,
        "id": tokenizer.pad_token_id,
        "type_id": tokenizer.pad_token_type_id,
        "side": tokenizer.padding_side,
    }
    return _Found(backend.to_str(), steps, tokenizer.truncation_side)


def _mistake(name: str, error: Exception) -> DataError:
    return DataError(
        f"data.tokenizer: expected a folder or a name on the hub of a tokenizer, or its file, got {name!r}: "
        f"{' '.join(str(error).split())[:200]}. Give that of the network that reads its tokens."
    )
