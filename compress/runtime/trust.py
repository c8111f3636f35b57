"""Who made an artefact: a signature by a key that never leaves this machine.

Programs for torch are unpickled and AOTInductor packages are native code, so a file of either may do anything when it
is loaded. They serve only where the artefact was built on this machine, or the caller trusts its source.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress.errors import ArtifactError
from compress.runtime.manifest import Manifest, manifest_bytes, parse_manifest

__all__ = ["SIGNATURE", "Signed", "is_ours", "read_signed", "sign", "signature_of"]

SIGNATURE = "signature.json"

_Signature = Mapping[str, str | None]

_MOST_BYTES = 2**16  # of a signature: two are some hundred


@dataclass(frozen=True)
class Signed:
    """An artefact's manifest, from one reading, and what its signature says of that very content.

    Args:
        manifest: What it says.
        signature: ``sha256`` and ``hmac_sha256`` of its content.
        ours: Whether the signature is by this machine's key.
    """

    manifest: Manifest
    signature: _Signature
    ours: bool


def sign(directory: Path) -> None:
    """Write the manifest's checksum, and a signature by this machine's key where it has one or can keep one.

    Args:
        directory: An artefact whose ``manifest.json`` is complete.
    """
    (directory / SIGNATURE).write_text(json.dumps(signature_of(manifest_bytes(directory)), indent=1))


def signature_of(content: bytes) -> _Signature:
    """Return a manifest's checksum and signature; ``{**of_this, "next": of_the_next}`` lets another take its place.

    Args:
        content: The manifest's.
    """
    key = _key(make=True)
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "hmac_sha256": None if key is None else hmac.new(key, content, hashlib.sha256).hexdigest(),
    }


def read_signed(path: str | Path) -> Signed:
    """Read an artefact's manifest once, and hold its signature against what was read.

    Args:
        path: The artefact's directory.

    Raises:
        ArtifactError: when one of the two is missing or damaged, or the manifest is not the one that was written.
    """
    content = manifest_bytes(path)
    manifest = parse_manifest(content, path)
    try:
        signature = _matching(Path(path), content)
    except ArtifactError:
        if manifest_bytes(path) == content:
            raise
        return read_signed(path)  # another has taken its place since it was read
    key, made_by = _key(make=False), signature["hmac_sha256"]
    if key is None or not isinstance(made_by, str):
        return Signed(manifest, signature, ours=False)
    wanted = hmac.new(key, content, hashlib.sha256).hexdigest()
    return Signed(manifest, signature, ours=hmac.compare_digest(wanted.encode(), made_by.encode()))


def is_ours(directory: Path) -> bool:
    """Say whether an artefact was built with this machine's key; raises as ``read_signed`` does."""
    return read_signed(directory).ours


def _matching(directory: Path, content: bytes) -> _Signature:
    """Return the signature of a manifest's content: of the manifest that is there, or of the one that follows it."""
    file, checksum = directory / SIGNATURE, hashlib.sha256(content).hexdigest()
    try:
        written = json.loads(_content(file))
        signatures = [
            {name: one[name] for name in ("sha256", "hmac_sha256")} for one in (written, written.get("next")) if one
        ]
        found = [one for one in signatures if one["sha256"] == checksum]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{file}: expected the manifest's checksum, got {type(error).__name__}: {error}. Export again."
        ) from error
    if not found:
        raise ArtifactError(
            f"{directory / 'manifest.json'}: expected the SHA-256 of {SIGNATURE}, got another. Export again."
        )
    return found[0]


def _content(file: Path) -> bytes:
    """Return what a signature's file holds: of what is no file, or has no end, a reader would never come back."""
    if not file.is_file():
        raise FileNotFoundError("no such file")
    with file.open("rb") as handle:
        content = handle.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES:,} bytes")
    return content


def _key(*, make: bool) -> bytes | None:
    """Return this machine's key, or none where there is none and none can be kept."""
    named = os.environ.get("COMPRESS_KEY")
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        file = Path(named or Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "compress" / "key")
        if make and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
            try:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
                    handle.write(secrets.token_bytes(32))
                _put(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
        return file.read_bytes() or None
    return None


def _put(temporary: Path, file: Path) -> None:
    """Give a key its place: the first of two processes wins, and its key is whole."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links, where two at the same moment are not told apart
        if not file.exists():
            os.replace(temporary, file)
