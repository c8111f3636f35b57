"""Samples as users have them, in batches that a model's ``predict`` takes: arrays, images, tables, texts."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.errors import ArtifactError, DataError, MissingPackageError
from compress.runtime.inputs import Raw, check_tokenizer
from compress.runtime.manifest import Manifest, TensorSpec
from compress.runtime.sizes import described

__all__ = ["Batch", "best_classes", "read_lines", "read_samples"]

_BATCH = 32
_MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FARTHEST = 20.0  # where training images are near 0 with a spread of 1, white is not beyond this


class Batch(NamedTuple):
    """Some samples.

    Args:
        names: What to call each.
        values: Raw values, shape (N, ...); N texts; or such values by the names of the inputs.
    """

    names: list[str]
    values: Raw


def read_samples(path: str | Path, manifest: Manifest, *, resize: bool = False) -> Iterator[Batch]:
    """Read samples in batches of up to 32.

    Args:
        path: A ``.npy`` file with a sample in each row; an ``.npz`` file with such an array for each input, by its
            name; a ``.csv`` file with a line of numbers for each, whose first line may name the columns; a ``.txt``
            file with a text in each line; an image; or a folder, with all images in it and in folders within.
        manifest: Of the artefact that is to predict them.
        resize: Bring images to the size of the input; otherwise another size is an error.

    Raises:
        DataError: when a file cannot be read, or holds what the input does not take.
        ArtifactError: when the artefact does not say how such samples become inputs.
        MissingPackageError: when Pillow is needed and not installed.
    """
    path = Path(path)
    if resize and not (path.is_dir() or path.suffix.lower() in _IMAGES):
        raise DataError(f"--resize: expected an image or a folder of images, got {path}. Leave it out.")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGES and file.name[0] != ".")
        if not files:
            raise DataError(f"{path}: expected a folder with images ({', '.join(_IMAGES)}), got none. Give another.")
        return _images(files, [str(file.relative_to(path)) for file in files], manifest, resize=resize)
    if not path.is_file():
        raise DataError(f"{path}: expected a file or a folder, got none. Give a path that exists.")
    if path.suffix.lower() in _IMAGES:
        return _images([path], [path.name], manifest, resize=resize)
    if path.suffix.lower() not in _READERS:
        kinds = ", ".join([*_READERS, *_IMAGES])
        raise DataError(f"{path}: expected one of {kinds}, or a folder of images, got another kind. Convert it.")
    return _READERS[path.suffix.lower()](path, manifest)


def read_lines(lines: Iterable[bytes], where: str, manifest: Manifest) -> Iterator[Batch]:
    """Read texts in batches of up to 32, one from each line that is not blank.

    Args:
        lines: In UTF-8, of a file opened for reading bytes.
        where: What to call it in errors.
        manifest: Of the artefact that is to predict them.

    Raises:
        DataError: when there is no text, or it is not UTF-8.
        ArtifactError: when the artefact holds no tokenizer.
    """
    check_tokenizer(manifest)
    texts = _texts(lines, where)
    first = next(texts, None)
    if first is None:
        raise DataError(f"{where}: expected a text in each line, got none. Write some.")
    return (Batch(list(some), some) for some in _chunks(chain([first], texts)))


def best_classes(probabilities: np.ndarray, num: int) -> np.ndarray:
    """Return the most probable classes of each sample, the best first.

    Args:
        probabilities: Shape (N, classes).
        num: How many.

    Returns:
        Shape (N, num).

    Raises:
        DataError: when there are not so many classes.

    Example:
        >>> best_classes(np.array([[0.1, 0.6, 0.3]]), 2).tolist()
        [[1, 2]]
    """
    if not 1 <= num <= probabilities.shape[-1]:
        raise DataError(f"--top_k: expected 1 to {probabilities.shape[-1]}, the number of classes, got {num}.")
    return np.argsort(-probabilities, axis=-1, kind="stable")[:, :num]


def _input(manifest: Manifest) -> TensorSpec:
    """Return the only input."""
    if len(manifest.inputs) != 1:
        names = ", ".join(spec.name for spec in manifest.inputs)
        raise ArtifactError(
            f"{manifest.name}: expected an artefact with one input, got {len(manifest.inputs)} ({names}). "
            "Save an array for each as .npz, by these names."
        )
    return manifest.inputs[0]


def _array(path: Path, manifest: Manifest) -> Iterator[Batch]:
    _input(manifest)
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of several")
    except Exception as error:  # of a damaged file numpy raises anything
        raise DataError(f"{path}: expected an array saved by numpy.save, got {error}. Save one.") from error
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"{path}: expected a sample in each row, got an array of shape {array.shape}. Save some.")
    return _cut(array)


def _table(path: Path, manifest: Manifest) -> Iterator[Batch]:
    spec = _input(manifest)
    sizes = spec.shape[1:]
    if sum(size != 1 for size in sizes) > 1:
        raise ArtifactError(
            f"{path}: expected an artefact whose samples are rows of numbers, got an input of shape {described(spec)}. "
            "Save an array as .npy."
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [(number, cells) for number, cells in enumerate(csv.reader(file), 1) if not _is_blank(cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected text, got {error}. Save it as UTF-8, with commas.") from error
    if lines and _are_names(lines[0][1]):
        del lines[0]
    if not lines:
        raise DataError(f"{path}: expected a line of numbers for each sample, got none. Write one for each.")
    width = len(lines[0][1]) if None in sizes else prod(size or 1 for size in sizes)
    for number, cells in lines:
        wrong = next((cell for cell in cells if not _is_number(cell)), None)
        if wrong is not None:
            raise DataError(f"{path}, line {number}: expected numbers between commas, got {wrong!r}. Correct it.")
        if len(cells) != width:
            raise DataError(f"{path}, line {number}: expected {width} numbers, got {len(cells)}. Cut or fill it.")
    values = np.array([[float(cell) for cell in cells] for _, cells in lines])
    return _cut(values.reshape(len(lines), *(width if size is None else size for size in sizes)))


def _arrays(path: Path, manifest: Manifest) -> Iterator[Batch]:
    wanted = ", ".join(spec.name for spec in manifest.inputs)
    try:
        opened = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError("one array")
        with opened as archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except Exception as error:  # zipfile as well
        raise DataError(f"{path}: expected arrays saved by numpy.savez, got {error}. Save {wanted}.") from error
    if set(arrays) != {spec.name for spec in manifest.inputs}:
        raise DataError(f"{path}: expected arrays named {wanted}, got {', '.join(arrays) or 'none'}. Save these.")
    sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(sizes) > 1 or 0 in sizes:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise DataError(f"{path}: expected a sample in each row of all arrays, got {shapes}. Save as many of each.")
    parts = {name: _cut(array) for name, array in arrays.items()}
    return (
        Batch(each[0].names, {name: part.values for name, part in zip(parts, each)}) for each in zip(*parts.values())
    )


def _text(path: Path, manifest: Manifest) -> Iterator[Batch]:
    try:
        with path.open("rb") as file:
            yield from read_lines(file, str(path), manifest)
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read, got {error}. Give another.") from error


_READERS: Mapping[str, Callable[[Path, Manifest], Iterator[Batch]]] = {
    ".npy": _array,
    ".npz": _arrays,
    ".csv": _table,
    ".txt": _text,
}


def _texts(lines: Iterable[bytes], where: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}, line {number}: expected text, got {error}. Save it as UTF-8.") from error
        if text:
            yield text


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    while some := list(islice(texts, _BATCH)):
        yield some


def _cut(array: np.ndarray) -> Iterator[Batch]:
    for start in range(0, len(array), _BATCH):
        values = np.asarray(array[start : start + _BATCH])
        yield Batch([str(start + index) for index in range(len(values))], values)


def _images(files: list[Path], names: list[str], manifest: Manifest, *, resize: bool) -> Iterator[Batch]:
    spec = _input(manifest)
    if len(spec.shape) != 4 or spec.shape[1] not in _MODES:
        raise ArtifactError(
            f"{manifest.name}: expected an input of shape (N, 1 or 3, H, W) for images, got {described(spec)}. "
            "Save an array as .npy."
        )
    _check_range(manifest)
    return _read_images(files, names, spec, resize=resize)


def _read_images(files: list[Path], names: list[str], spec: TensorSpec, *, resize: bool) -> Iterator[Batch]:
    for start in range(0, len(files), _BATCH):
        some = files[start : start + _BATCH]
        images = [_image(file, spec, resize=resize) for file in some]
        other = next((i for i, image in enumerate(images) if image.shape != images[0].shape), None)
        if other is not None:  # where the input takes any size
            got = "{}\N{MULTIPLICATION SIGN}{}".format(*images[other].shape[:0:-1])
            raise DataError(f"{some[other]}: expected the size of the image before, got {got}. Give one at a time.")
        yield Batch(names[start : start + _BATCH], np.stack(images))


def _image(file: Path, spec: TensorSpec, *, resize: bool) -> np.ndarray:
    """Return an image as uint8, shape (C, H, W), upright."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingPackageError("Pillow") from error
    channels, height, width = spec.shape[1:]
    try:
        with Image.open(file) as opened:
            if opened.mode[0] in "IF":  # converted, all beyond 255 would become 255
                raise DataError(f"{file}: expected 8 bits a channel, got mode {opened.mode}. Convert it.")
            image = ImageOps.exif_transpose(opened).convert(_MODES[channels or 0])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: expected an image, got {error}. Take it out, or save it again.") from error
    wanted = (width or image.width, height or image.height)
    if image.size != wanted and not resize:
        sizes = ["{}\N{MULTIPLICATION SIGN}{}".format(*size) for size in (wanted, image.size)]
        raise DataError(
            f"{file}: expected {sizes[0]} pixels, got {sizes[1]}. Say --resize, or cut it as the training images were."
        )
    if image.size != wanted:
        image = image.resize(wanted, Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(*image.size[::-1], -1).transpose(2, 0, 1)


def _check_range(manifest: Manifest) -> None:
    """Refuse images where preprocessing is made for other values than those of pixels."""
    steps: Mapping[str, Any] = manifest.preprocessing or {}
    if not steps:
        raise ArtifactError(
            f"{manifest.name}: expected preprocessing in the manifest, by which pixels become inputs, got none. "
            "Save an array of inputs as .npy."
        )
    white = (255 * float(steps["scale"]) - np.array(steps["mean"], float)) / np.array(steps["std"], float)
    if np.abs(white).max() > _FARTHEST:
        raise ArtifactError(
            f"{manifest.name}: expected preprocessing for pixels from 0 to 255, got one that makes "
            f"{np.abs(white).max():.0f} of 255. Save an array of values as they were in training as .npy."
        )


def _is_blank(cells: list[str]) -> bool:
    """Say whether a line of a table is none; one of commas alone is a sample whose numbers are missing."""
    return len(cells) <= 1 and not any(map(str.strip, cells))


def _are_names(cells: list[str]) -> bool:
    """Say whether a table's first line names its columns; NaN is a number that is missing, and no name."""
    return any(map(str.strip, cells)) and all(_float(cell) is None for cell in cells)


def _is_number(cell: str) -> bool:
    number = _float(cell)
    return number is not None and isfinite(number) and "_" not in cell


def _float(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
