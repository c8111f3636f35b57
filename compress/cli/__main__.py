"""``python -m compress.cli`` is the ``compress`` command."""

import sys

from compress.cli import main

if __name__ == "__main__":  # not where something imports every module
    sys.exit(main())
