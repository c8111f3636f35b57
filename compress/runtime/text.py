"""From texts to what a network takes, by the tokenizer that an artefact holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from compress.errors import ArtifactError, MissingPackageError

__all__ = ["Encode", "make_encoder"]

Encode = Callable[[Sequence[str]], list[np.ndarray]]
"""Returns int64 arrays of shape (N, length) for N texts, one for each input of the network."""

_ATTRIBUTES = {"ids": "ids", "mask": "attention_mask", "type_ids": "type_ids"}  # of an encoding


def make_encoder(content: str, steps: Mapping[str, Any]) -> Encode:
    """Return what turns texts into tokens of one length, longer ones cut and shorter ones filled up.

    Args:
        content: What a ``tokenizer.json`` of Hugging Face's ``tokenizers`` holds.
        steps: A manifest's preprocessing of text; it goes before what the file says of padding and truncation.

    Raises:
        ArtifactError: when that is no tokenizer, or ``steps`` are not what it can do.
        MissingPackageError: when ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError("tokenizers", "text") from error
    length, padding = steps["length"], steps["padding"]
    try:
        tokenizer = Tokenizer.from_str(content)
        tokenizer.enable_truncation(length, direction=steps["truncation"]["side"])
        tokenizer.enable_padding(
            length=length,
            direction=padding["side"],
            pad_id=padding["id"],
            pad_type_id=padding["type_id"],
            pad_token=padding["token"],
        )
    except Exception as error:  # the library raises nothing narrower
        raise ArtifactError(
            f"tokenizer: expected one of Hugging Face's tokenizers, of {length} tokens, got {error}. "
            "Export again, or update tokenizers."
        ) from error

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        try:
            found = tokenizer.encode_batch(list(texts))
        except Exception as error:
            raise ArtifactError(
                f"text: expected texts for a tokenizer of {length} tokens, got {error}. Correct them."
            ) from error
        return [np.array([getattr(each, _ATTRIBUTES[name]) for each in found], np.int64) for name in steps["inputs"]]

    return encode
