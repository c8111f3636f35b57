"""Texts become the tokens of the network's own tokenizer, whichever library reads that."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Reference

from compress.data import Tokenizer, text
from compress.errors import ArtifactError, DataError, MissingPackageError
from tests.data.files import write_tokenizer

TEXTS = ["a fine film", "", "A film, a film", "fine " * 20]


def test_tokens_are_those_of_the_library(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "words.json", "a fine film")
    tokens, mask = Tokenizer(file, 6)(TEXTS)
    assert tokens.tolist()[:3] == [[2, 4, 5, 6, 3, 0], [2, 3, 0, 0, 0, 0], [2, 4, 6, 1, 4, 3]]
    assert torch.equal(mask, (tokens != 0).long())
    assert tokens.dtype == mask.dtype == torch.int64
    reference = Reference.from_file(file)
    reference.enable_padding(length=6)
    reference.enable_truncation(6)
    assert tokens.tolist() == [each.ids for each in reference.encode_batch(TEXTS)]


def test_inputs_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        write_tokenizer(tmp_path / "words.json", "a fine film"), 5, inputs=("mask", "type_ids", "ids")
    )
    assert [tensor.tolist() for tensor in tokenizer(["film"])] == [[[1, 1, 1, 0, 0]], [[0] * 5], [[2, 6, 3, 0, 0]]]


def test_sides_and_padding_are_those_of_the_file(tmp_path: Path) -> None:
    file = Path(write_tokenizer(tmp_path / "words.json", "a fine film"))
    reference = Reference.from_file(str(file))
    reference.enable_padding(direction="left", pad_id=6, pad_token="film")
    reference.enable_truncation(64, direction="left")
    reference.save(str(file))
    tokens, mask = Tokenizer(str(file), 4)(["a", "a film fine a film fine"])
    assert tokens.tolist() == [[6, 2, 4, 3], [2, 6, 5, 3]]
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    files = {
        "absent.json": None,
        "words.json": "[PAD] a b",
        "list.json": "[]",
        "other.json": json.dumps({"padding": {"pad_token": "x"}, "truncation": None}),
        "short.json": json.dumps(
            {
                "padding": {"pad_token": "x", "pad_id": 0, "pad_type_id": 0, "direction": "Right"},
                "truncation": None,
            }
        ),
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"data\.tokenizer: expected a folder or .*{name}"):
            Tokenizer(str(tmp_path / name), 8)
    file = write_tokenizer(tmp_path / "bare.json", "a", pads=False)
    with pytest.raises(DataError, match=r"bare\.json': one that does not say how it pads: call its enable_padding"):
        Tokenizer(file, 8)


def test_texts_that_it_cannot_take_are_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "words.json", "a b", marks=False), 4)
    assert tokenizer(["a b"])[0].tolist() == [[1, 2, 0, 0]]
    with pytest.raises(ArtifactError, match=r"text: expected texts for a tokenizer of 4 tokens, got .*UNK"):
        tokenizer(["c"])


def test_packages_that_are_absent_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(text, "import_library", absent)
    with pytest.raises(MissingPackageError, match=r"transformers: expected an installed package.*'\.\[zoo\]'"):
        Tokenizer("some/tokenizer", 8)
    file = write_tokenizer(tmp_path / "words.json", "a")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match=r"tokenizers: expected an installed package.*'\.\[text\]'"):
        Tokenizer(file, 8)


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "left")])
def test_a_folder_gives_the_tokens_that_transformers_gives(tmp_path: Path, sides: tuple[str, str]) -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fine", "film", "a", "##s", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    where = {"padding_side": sides[0], "truncation_side": sides[1]}
    reference = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"), **where)
    reference.save_pretrained(tmp_path / "folder")
    tokenizer = Tokenizer(str(tmp_path / "folder"), 6, inputs=("ids", "mask", "type_ids"))
    wanted = reference([*TEXTS, "Films"], padding="max_length", truncation=True, max_length=6, return_tensors="pt")
    for tensor, name in zip(tokenizer([*TEXTS, "Films"]), ("input_ids", "attention_mask", "token_type_ids")):
        assert torch.equal(tensor, wanted[name])
    with pytest.raises(
        DataError, match=r"data\.tokenizer: expected a folder or a name on the hub.*" + re.escape("absent")
    ):
        Tokenizer(str(tmp_path / "absent"), 6)
