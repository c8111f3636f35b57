"""Sentences of SST-2 from a folder or the Hugging Face hub, as tokens of a fixed length."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from compress.data.samples import TensorDataModule, TensorSplit, TensorSplits
from compress.data.splits import stratified_split
from compress.data.text import Tokenizer
from compress.errors import DataError, RecipeError

__all__ = ["SST2"]

_CLASSES = ("negative", "positive")
_HUB = "SetFit/sst2"
_FILES = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
_HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}


class SST2(TensorDataModule):
    """Sentences of film reviews, negative or positive: 6,920 to train, 872 to validate, 1,821 to test.

    Source: Socher et al. 2013, *Recursive deep models for semantic compositionality over a sentiment treebank*, EMNLP.
    The files are looked for in ``root``; without one in ``$COMPRESS_DATA/sst2``, then on the Hugging Face hub.

    Batches are ``((tokens, mask), y)``: tokens and mask int64 of shape (N, length), mask 1 where a token counts and 0
    where it only fills; y int64 of shape (N,). Those of the training split are ``((tokens, mask), y, keys)``. Networks
    get both by position, as Hugging Face's do: ``forward(input_ids, attention_mask)``. An artefact gets the tokenizer,
    and predicts sentences.

    Args:
        tokenizer: Folder or name on the hub of a Hugging Face tokenizer, or a ``tokenizer.json`` that says how it pads
            (see ``Tokenizer``).
        root: Folder with ``train.tsv``, ``dev.tsv`` and ``test.tsv``: a sentence, a tabulator, 0 or 1.
        length: Tokens of each sentence; longer ones are cut, shorter ones filled up.
        batch_size: Sentences in a batch, on each device.
        seed: Of the choice and the order of the training sentences.
        num_train: Train on this many sentences, with each class's share; all by default.
        num_workers: Processes that prepare training batches; 0 for none.

    Raises:
        RecipeError: when ``length`` leaves no room for words, or ``num_train`` is not positive.
    """

    def __init__(
        self,
        tokenizer: str = "sentence-transformers/all-MiniLM-L6-v2",
        root: str | None = None,
        length: int = 64,
        batch_size: int = 32,
        seed: int = 0,
        num_train: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if length < 3:
            raise RecipeError(f"data.length: expected at least 3 tokens, got {length}. Use 64, say.")
        if num_train is not None and num_train < 1:
            raise RecipeError(f"data.num_train: expected a positive number, got {num_train}. Leave it out for all.")
        self.tokenizer = tokenizer
        self.root = root
        self.length = length
        self.num_train = num_train

    def load(self) -> TensorSplits:
        """Return the tokens of all sentences, and set ``preprocessing`` to how they are made.

        Raises:
            DataError: when there are no files or no tokenizer, or a file is damaged.
            MissingPackageError: when transformers or tokenizers is not installed.
        """
        folder = _find(self.root)
        read = {name: _read_hub(name) if folder is None else _read_file(folder / _FILES[name]) for name in _FILES}
        labels = torch.tensor(read["train"][1])
        if self.num_train is not None:
            if self.num_train > len(labels):
                raise DataError(
                    f"data.num_train: expected at most {len(labels)} sentences, got {self.num_train}. "
                    "Leave it out for all."
                )
            chosen = stratified_split(labels.numpy(), self.num_train, seed=self.seed)[1].tolist()
            read["train"] = ([read["train"][0][i] for i in chosen], [read["train"][1][i] for i in chosen])
        tokenize = Tokenizer(self.tokenizer, self.length)
        self.preprocessing, self.preprocessing_files = tokenize.preprocessing, tokenize.files
        splits = {
            name: TensorSplit(tokenize(sentences), torch.tensor(labels)) for name, (sentences, labels) in read.items()
        }
        return TensorSplits(**splits, classes=_CLASSES)


def _find(root: str | None) -> Path | None:
    """Return the folder with the files, or None when only the hub is left."""
    if root is not None:
        missing = [file for file in _FILES.values() if not (Path(root) / file).is_file()]
        if missing:
            raise DataError(
                f"data.root: expected a folder with {', '.join(_FILES.values())}, got {root} without "
                f"{' and '.join(missing)}. Give the folder that holds all three, or leave root out."
            )
        return Path(root)
    here = os.environ.get("COMPRESS_DATA")
    folder = Path(here) / "sst2" if here else None
    return folder if folder is not None and (folder / _FILES["train"]).is_file() else None


def _read_file(path: Path) -> tuple[list[str], list[int]]:
    """Return sentences and classes."""
    sentences, classes = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        sentence, tab, label = line.rpartition("\t")
        if not tab or label.strip() not in ("0", "1"):
            raise DataError(
                f"{path}, line {number}: expected a sentence, a tabulator and 0 or 1, got {line[-40:]!r}. "
                "Leave out headings, and write one sentence a line."
            )
        sentences.append(sentence)
        classes.append(int(label))
    if not sentences:
        raise DataError(f"{path}: expected a sentence in each line, got none. Fetch it again.")
    return sentences, classes


def _read_hub(name: str) -> tuple[list[str], list[int]]:
    import datasets

    try:
        dataset = datasets.load_dataset(_HUB, split=_HUB_SPLITS[name])
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "data: expected SST-2 in $COMPRESS_DATA/sst2 or on the Hugging Face hub, got neither (hub: "
            f"{type(error).__name__}). Put {', '.join(_FILES.values())} into a folder and set data.root to it."
        ) from error
    missing = {"text", "label"} - set(dataset.column_names)
    labels = [] if missing else list(dataset["label"])
    if missing or set(labels) - {0, 1}:
        got = ", ".join(dataset.column_names) if missing else sorted(set(labels))
        raise DataError(f"{_HUB}: expected columns text and label with 0 and 1, got {got}. Set data.root to a folder.")
    return list(dataset["text"]), labels
