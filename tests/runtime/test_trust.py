from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ArtifactError
from compress.runtime import load, trust
from compress.runtime.engines import runs_code
from compress.runtime.loading import load_and_call
from compress.runtime.trust import SIGNATURE, is_ours, sign
from tests.export.programs import HERE, artifact, edit, quantized


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact(), tmp_path / "copy"))


def test_a_copy_on_the_same_machine_is_ours(copy: Path) -> None:
    assert is_ours(copy)
    assert load(copy).engines == tuple(HERE)


def test_from_elsewhere_only_files_without_code_serve(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESS_KEY", str(tmp_path / "another"))
    assert not is_ours(copy)
    with pytest.warns(UserWarning, match=r"eager: its file may run code.*trust=True.*served by: onnxruntime"):
        model = load(copy)
    assert model.engines == tuple(name for name in HERE if not runs_code(name))
    assert model(quantized().inputs).shape == (150, 3)
    for engine in filter(runs_code, HERE):
        with pytest.raises(ArtifactError, match=rf"{engine}: its file may run code"):
            load(copy, engine=engine)
        with pytest.raises(ArtifactError, match="its file may run code"):
            load_and_call(str(copy), engine)
    assert load(copy, engine="eager", trust=True).engine == "eager"
    assert load(copy, trust=True).engines == tuple(HERE)


def test_a_manifest_that_is_replaced_while_it_is_read_is_read_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = trust.manifest_bytes
    replaced: list[Path] = []

    def meanwhile(path: Path) -> bytes:
        content = read(path)
        if not replaced:
            replaced.append(path)
            edit(path, lambda manifest: manifest.update(name="another"))
        return content

    monkeypatch.setattr(trust, "manifest_bytes", meanwhile)
    signed = trust.read_signed(copy)
    assert (signed.manifest.name, signed.ours) == ("another", True)


def test_a_key_is_made_once_for_its_owner_alone(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_KEY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert not is_ours(copy)
    assert not (tmp_path / "config").exists()  # looking makes no key
    sign(copy)
    key = tmp_path / "config" / "compress" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert list(key.parent.iterdir()) == [key]
    made = key.read_bytes()
    sign(copy)
    assert (key.read_bytes(), len(made)) == (made, 32)
    assert is_ours(copy)


def test_a_key_is_made_where_there_are_no_hard_links(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setenv("COMPRESS_KEY", str(tmp_path / "keys" / "key"))
    monkeypatch.setattr(os, "link", none)
    sign(copy)
    key = tmp_path / "keys" / "key"
    assert [file.name for file in key.parent.iterdir()] == ["key"]
    assert (stat.S_IMODE(key.stat().st_mode), key.stat().st_size) == (0o600, 32)
    assert is_ours(copy)
    key.unlink()
    monkeypatch.setattr(os, "replace", none)
    sign(copy)
    assert not list(key.parent.iterdir())
    assert not is_ours(copy)


def test_where_no_key_can_be_kept_an_artefact_is_from_elsewhere(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESS_KEY", str(tmp_path / "file" / "key"))
    sign(copy)
    assert json.loads((copy / SIGNATURE).read_text())["hmac_sha256"] is None
    assert not is_ours(copy)


def test_the_manifest_is_read_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is read again may not be what was checked.
    opened: list[str] = []
    open_file = io.open

    def spy(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(str(file)).name)
        return open_file(file, *args, **kwargs)

    monkeypatch.setattr("io.open", spy)
    load(copy)
    assert (opened.count("manifest.json"), opened.count(SIGNATURE)) == (1, 1)


def test_a_manifest_that_was_changed_is_refused(copy: Path) -> None:
    file = copy / "manifest.json"
    file.write_text(file.read_text().replace("left", "lift"))
    with pytest.raises(ArtifactError, match=r"manifest\.json: expected the SHA-256 of signature\.json, got another"):
        load(copy)


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff", b'{"sha256": 3, "hmac_sha256": null}'])
def test_a_damaged_signature_is_refused(copy: Path, content: bytes | None) -> None:
    file = copy / SIGNATURE
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ArtifactError, match="Export again"):
        load(copy)


@pytest.mark.timeout(60)
def test_a_signature_that_is_no_file_or_has_no_end_is_refused_at_once(copy: Path) -> None:
    file = copy / SIGNATURE
    for make, reason in [
        (lambda: os.mkfifo(file), "FileNotFoundError"),
        (lambda: file.symlink_to("/dev/zero"), "FileNotFoundError"),
        (lambda: file.mkdir(), "FileNotFoundError"),
        (lambda: file.write_bytes(b" " * 2**16 + b"{}"), "ValueError: more than 65,536 bytes"),
    ]:
        file.unlink()
        make()
        with pytest.raises(ArtifactError, match=f"expected the manifest's checksum, got {reason}"):
            load(copy)
        if file.is_dir():
            file.rmdir()
            file.touch()


@pytest.mark.parametrize("made_by", ["", "0" * 64, "\u00e4", 5, None])
def test_no_signature_but_the_right_one_is_ours(copy: Path, made_by: object) -> None:
    file = copy / SIGNATURE
    file.write_text(json.dumps({**json.loads(file.read_text()), "hmac_sha256": made_by}))
    assert not is_ours(copy)
