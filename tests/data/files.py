"""Small files in the form of the data sets that we read."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors


def pack_idx(array: np.ndarray) -> bytes:
    """Return an array of unsigned bytes in idx form, unpacked."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion_mnist(folder: Path, *, num_train: int = 60, num_test: int = 20) -> dict[str, np.ndarray]:
    """Write the four files with random images and return what they hold, by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = {
        f"{name}-{kind}.gz": generator.integers(0, 256, (num, 28, 28)) if "images" in kind else np.arange(num) % 10
        for name, num in (("train", num_train), ("t10k", num_test))
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    }
    for file, array in arrays.items():
        (folder / file).write_bytes(gzip.compress(pack_idx(array.astype(np.uint8))))
    return arrays


def write_cifar10(folder: Path, *, num_train: int = 60, num_test: int = 20, image: str = "image") -> dict[str, Any]:
    """Write both parquet files with random images in PNG and return images and labels, by split."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    features = datasets.Features({image: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    written = {}
    for name, num in (("train", num_train), ("test", num_test)):
        images, labels = generator.integers(0, 256, (num, 32, 32, 3)).astype(np.uint8), np.arange(num) % 10
        rows = {image: list(images), "label": labels.tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
        written[name] = (images, labels)
    return written


def write_ucr(folder: Path, name: str = "ECG5000", *, num_train: int = 20, num_test: int = 12, length: int = 9) -> Any:
    """Write both ``.tsv`` files with random series of two classes, 1 and 3; return series and labels, by part."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    written = {}
    for part, num in (("TRAIN", num_train), ("TEST", num_test)):
        series, labels = generator.standard_normal((num, length)) * 5 + 2, 1 + 2 * (np.arange(num) % 2)
        rows = ["\t".join(map(str, [label, *values])) for label, values in zip(labels, series.tolist())]
        (folder / f"{name}_{part}.tsv").write_text("\n".join(rows) + "\n")
        written[part] = (series, labels)
    return written


def write_sst2(folder: Path, *, num_train: int = 10, num_dev: int = 6, num_test: int = 4) -> None:
    """Write three files with sentences that say which file and line they are from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, num in (("train", num_train), ("dev", num_dev), ("test", num_test)):
        lines = [f"{name} {'good ' * (i % 3)}{i}\t{i % 2}" for i in range(num)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


def write_tokenizer(file: Path, words: str, *, marks: bool = True, pads: bool = True) -> str:
    """Write a tokenizer of words in lower case, filled up with 0, and return the file's name.

    With ``marks`` the first word is 4, another is 1, and 2 and 3 stand around the text; without them the first is 1.
    """
    first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if marks else ["[PAD]"]
    vocabulary = {word: index for index, word in enumerate([*first, *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    if pads:
        tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(file))
    return str(file)
