"""What every test needs: a key of its own to sign artefacts with, not the user's."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_FOLDER = tempfile.mkdtemp(prefix="key")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["COMPRESS_KEY"] = str(Path(_FOLDER) / "key")
