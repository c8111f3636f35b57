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
from pathlib import Path

from compress.errors import ArtifactError

__all__ = ["SIGNATURE", "is_ours", "sign"]

SIGNATURE = "signature.json"


def sign(directory: Path) -> None:
    """Write the manifest's checksum, and a signature by this machine's key where it has one or can keep one.

    Args:
        directory: An artefact whose ``manifest.json`` is complete.
    """
    content = (directory / "manifest.json").read_bytes()
    key = _key(make=True)
    signature = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "hmac_sha256": None if key is None else hmac.new(key, content, hashlib.sha256).hexdigest(),
    }
    (directory / SIGNATURE).write_text(json.dumps(signature, indent=1))


def is_ours(directory: Path) -> bool:
    """Say whether an artefact was built with this machine's key, once its manifest's checksum is right.

    Args:
        directory: The artefact.

    Raises:
        ArtifactError: when the signature is missing or damaged, or the manifest is not the one that was written.
    """
    file = directory / SIGNATURE
    content = (directory / "manifest.json").read_bytes()
    try:
        signature = json.loads(file.read_bytes())
        checksum, made_by = signature["sha256"], signature["hmac_sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(
            f"{file}: expected the manifest's checksum, got {type(error).__name__}: {error}. Export again."
        ) from error
    if checksum != hashlib.sha256(content).hexdigest():
        raise ArtifactError(
            f"{directory / 'manifest.json'}: expected the SHA-256 of {SIGNATURE}, got another. Export again."
        )
    key = _key(make=False)
    if key is None or not isinstance(made_by, str):
        return False
    return hmac.compare_digest(hmac.new(key, content, hashlib.sha256).hexdigest().encode(), made_by.encode())


def _key(*, make: bool) -> bytes | None:
    """Return this machine's key, or none where there is none and none can be kept."""
    named = os.environ.get("COMPRESS_KEY")
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        file = Path(named or Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "compress" / "key")
        if make and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f"{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
                handle.write(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, file)  # the first of two processes wins, and its key is whole
            temporary.unlink()
        return file.read_bytes() or None
    return None
