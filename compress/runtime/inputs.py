"""From raw values to a network's inputs, with the manifest's preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compress.errors import ArtifactError
from compress.runtime.manifest import Manifest, TensorSpec, preprocesses_text
from compress.runtime.sizes import described
from compress.runtime.text import Encode

__all__ = ["Raw", "check_dense", "check_rows", "check_tokenizer", "in_order", "numbers_of", "preprocess", "raw_inputs"]

_NAMED = 5

Raw = np.ndarray | Sequence[str] | Mapping[str, np.ndarray]
"""Samples as they are stored: an array, texts, or an array for each input by its name."""


def raw_inputs(raw: Any, manifest: Manifest, encode: Encode | None) -> tuple[np.ndarray, ...]:
    """Turn raw values into the network's inputs.

    Args:
        raw: An array of shape (N, ...), a list of N texts, or arrays by the names of the inputs.
        manifest: Of the artefact.
        encode: What turns texts into tokens, where the artefact holds a tokenizer.

    Raises:
        ArtifactError: when that is nothing that the artefact can take.
    """
    if isinstance(raw, str):
        raise ArtifactError("raw: expected a list of texts, got one alone. Put it into brackets.")
    if isinstance(raw, list | tuple) and raw and all(isinstance(text, str) for text in raw):
        check_tokenizer(manifest)
        assert encode is not None
        return tuple(_cast(array, spec) for array, spec in zip(encode(raw), manifest.inputs))
    if not isinstance(raw, Mapping):
        return (preprocess(raw, manifest),)
    given = in_order(raw, manifest)
    if len(given) == 1:
        return (preprocess(given[0], manifest),)
    if manifest.preprocessing and not preprocesses_text(manifest.preprocessing):
        raise ArtifactError(
            f"{manifest.name}: expected one input for its preprocessing, got {len(given)}. "
            "Call the model with arrays as the network takes them."
        )
    return tuple(_cast(_numbers(array, spec), spec) for array, spec in zip(given, manifest.inputs))


def preprocess(raw: Any, manifest: Manifest) -> np.ndarray:
    """Turn raw values into the network's input: ``(raw * scale - mean) / std`` by channel.

    Args:
        raw: Array, or nested lists, of shape (N, H, W) for one channel, else as the input.
        manifest: With ``preprocessing``; without any, or with that of text, values only change their dtype.

    Returns:
        Array of the input's dtype.

    Raises:
        ArtifactError: when they are of another shape, no numbers, or such that that dtype cannot hold.
    """
    spec = manifest.inputs[0]
    raw = _numbers(raw, spec)
    if raw.ndim == len(spec.shape) - 1 > 0 and spec.shape[1] == 1:
        raw = raw[:, None]
    if raw.ndim != len(spec.shape) or any(wanted not in (None, size) for wanted, size in zip(spec.shape, raw.shape)):
        raise ArtifactError(f"{spec.name}: expected shape {described(spec)}, got {raw.shape}. Reshape the samples.")
    steps: Mapping[str, Any] = manifest.preprocessing or {}
    if not steps or preprocesses_text(steps):
        return _cast(raw, spec)
    wide = (1, -1) + (1,) * (raw.ndim - 2)
    mean, std = (np.asarray(steps[key], dtype=np.float32).reshape(wide) for key in ("mean", "std"))
    with np.errstate(over="ignore", invalid="ignore"):
        values = (raw.astype(np.float32) * np.float32(steps["scale"]) - mean) / std
    return _cast(values, spec, given=raw)


def in_order(given: Mapping[str, Any] | Sequence[Any], manifest: Manifest) -> tuple[Any, ...]:
    """Return inputs that are given by name in the manifest's order; those in a tuple or list are in it.

    Raises:
        ArtifactError: when the names are not the manifest's.
    """
    if not isinstance(given, Mapping):
        return tuple(given)
    names = [spec.name for spec in manifest.inputs]
    if set(given) != set(names):
        got = ", ".join(map(str, given)) or "none"
        raise ArtifactError(f"inputs: expected {', '.join(names)}, got {got}. Give each of these names, and no other.")
    return tuple(given[name] for name in names)


def check_tokenizer(manifest: Manifest) -> None:
    """Refuse text where there is no tokenizer.

    Raises:
        ArtifactError: when the artefact holds none.
    """
    if not preprocesses_text(manifest.preprocessing or {}):
        raise ArtifactError(
            f"{manifest.name}: expected an artefact that holds a tokenizer, got none. Give arrays by name, or export "
            "from data that hand theirs over, as compress.data.SST2 does."
        )


def check_dense(inputs: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Refuse tensors without memory of their own for every value.

    Raises:
        ArtifactError: when one is sparse, or on the meta device.
    """
    for spec, value in zip(specs, inputs):
        layout, device = str(value.layout), value.device.type
        if layout != "torch.strided" or device == "meta":
            got = layout if device != "meta" else "one on the meta device"
            raise ArtifactError(f"{spec.name}: expected a dense tensor with values, got {got}. Convert it.")


def check_rows(inputs: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Refuse integers beyond the table that they look up, of which some engines make an answer.

    Args:
        inputs: Arrays, or tensors on any device, of the shapes and dtypes of their specs.
        specs: Of the inputs; only those with ``num_rows`` are looked at.

    Raises:
        ArtifactError: when one is negative, or not below the number of rows.
    """
    for spec, value in zip(specs, inputs):
        num = spec.num_rows
        if num is None or 0 in value.shape:
            continue
        if isinstance(value, np.ndarray) or value.device.type == "cpu":
            # What is negative is large without a sign: one look is enough.
            numbers = value if isinstance(value, np.ndarray) else value.numpy()
            fits = numbers.view(f"u{numbers.itemsize}").max() < num
        else:
            least, most = value.aminmax()
            fits = least >= 0 and most < num
        if not fits:
            numbers = value if isinstance(value, np.ndarray) else value.cpu().numpy()
            wrong = (numbers < 0) | (numbers >= num)
            raise ArtifactError(
                f"{spec.name}: expected whole numbers from 0 to {num - 1}, the rows of the network's table, got "
                f"{numbers[wrong][0]} in samples {numbers_of(wrong)}. Correct them."
            )


def numbers_of(wrong: np.ndarray) -> str:
    """Name the samples in which something is wrong, the first of them, for messages.

    Example:
        >>> numbers_of(np.array([[False, False], [False, True], [True, True]]))
        '1, 2'
    """
    places = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
    return ", ".join(map(str, places[:_NAMED])) + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")


def _numbers(raw: Any, spec: TensorSpec) -> np.ndarray:
    if hasattr(raw, "detach"):
        check_dense([raw], [spec])
        raw = raw.detach().cpu()
    try:
        array = np.asarray(raw)
    except ValueError as error:  # lists of several lengths
        raise ArtifactError(f"{spec.name}: expected numbers, got {error}. Correct them.") from error
    if array.dtype.kind not in "biuf":
        raise ArtifactError(f"{spec.name}: expected numbers, got an array of {array.dtype}. Convert it.")
    return array


def _cast(array: np.ndarray, spec: TensorSpec, given: np.ndarray | None = None) -> np.ndarray:
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            cast = array.astype(spec.dtype)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{spec.name}: expected numbers, got {error}. Correct them.") from error
    if cast.dtype.kind in "iu" and not np.array_equal(cast, array):
        raise ArtifactError(f"{spec.name}: expected whole numbers of {spec.dtype}, got others. Give tokens, say.")
    # NaN and infinity pass where they were given: they may stand for what is missing.
    if cast.dtype.kind == "f" and (lost := np.isfinite(array if given is None else given) & ~np.isfinite(cast)).any():
        raise ArtifactError(
            f"{spec.name}: expected numbers that {spec.dtype} holds, got larger ones in samples "
            f"{numbers_of(lost)}. Correct them."
        )
    return cast
