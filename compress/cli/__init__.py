"""The ``compress`` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from compress.cli.artifacts import predict
from compress.cli.parser import make_parser
from compress.cli.steps import how_to_go_on
from compress.errors import CompressError
from compress.libraries import mend_torchvision

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(markup=False)  # paths and messages may hold brackets
    if not console.is_terminal:
        console = Console(markup=False, width=140)  # a file or a pipe has no edge to wrap at
    sys.path.append(os.getcwd())  # so that class paths may name modules of the user's folder
    parser = make_parser()
    options, rest = argparse.Namespace(command=None), list[str]()
    try:
        options, rest = parser.parse_known_args(words)
        if options.command is not predict:  # all others import Lightning, and with it torchvision
            mend_torchvision()
        return options.command(options, rest, console) or 0
    except CompressError as error:
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        where = os.environ.get("COMPRESS_RUN_DIR")
        go_on = f" Go on with: {how_to_go_on(options, rest, where)}" if where else ""
        Console(stderr=True).print(Text.assemble(("interrupted.", "bold yellow"), go_on), soft_wrap=True)
        return 130
