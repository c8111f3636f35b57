"""What is said of a recipe's keys: the list of ``--keys``, and what is wrong with a key that is not among them."""

from __future__ import annotations

import argparse
import difflib
import inspect
import pydoc
import re
from collections.abc import Iterable, Iterator, Mapping

from jsonargparse import ArgumentParser, DefaultHelpFormatter

__all__ = ["KeysFormatter", "chain", "describe_keys", "unknown_key"]

_NO_KEYS = ("-h", "--config", "--print_config")
_UNKNOWN = re.compile(r"(?:Group '(?P<group>.+)' does not accept o|O)ption '(?P<key>[^']+)'(?: is not accepted)?")
_WORD = re.compile(r"unrecognized arguments: (?P<word>\S+)")
_ALL = "'compress run --keys' lists all."


class KeysFormatter(DefaultHelpFormatter):
    """Help on keys alone, without the hundreds of classes that are subclasses of ``nn.Module``."""

    def add_argument(self, action: argparse.Action) -> None:
        """Leave out what is no key."""
        name = next(iter(action.option_strings), "")
        if name not in _NO_KEYS and not name.endswith(".help") and action.metavar != "CONFIG":
            super().add_argument(action)

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r",? ?known subclasses: [^)]*", "", super()._expand_help(action)).removesuffix(" ()")


def describe_keys(parser: ArgumentParser, sections: Mapping[str, type]) -> str:
    """Return the help of a recipe's parser, and that of sections that it knows as single keys.

    Args:
        parser: The recipe's.
        sections: The class behind each such key.
    """
    more = ArgumentParser(usage=argparse.SUPPRESS, add_help=False, formatter_class=KeysFormatter)
    for name, section in sections.items():
        more.add_class_arguments(section, name)
    return f"{parser.format_help()}\n{more.format_help()}"


def unknown_key(error: Exception, parser: ArgumentParser) -> str | None:
    """Return what to say where an error of jsonargparse means that there is no such key, with the nearest that is.

    Args:
        error: As raised while a recipe was parsed.
        parser: That parsed it.
    """
    links = list(map(str, chain(error)))
    known = {action.dest for action in parser._actions} - {"help", "print_config"}
    if found := _WORD.match(links[-1]):
        if not found["word"].startswith("--"):
            return f"recipe: expected keys as --prune.ratio 0.3, got {found['word']}. {_ALL}"
        return _message(found["word"][2:].partition("=")[0], known)
    found = _UNKNOWN.fullmatch(links[-1])
    if found is None:
        return None
    above = [match[1] for text in links if (match := re.match('Parser key "(.+)":', text))]
    if classes := [match[1] for text in links if (match := re.match("Problem with given class_path '(.+)'", text))]:
        known = _arguments(classes[-1])
    prefix = [*dict.fromkeys(above), *filter(None, [found["group"]])]
    known = {".".join([*prefix, name]) for name in known} if classes else known
    return _message(".".join([*prefix, found["key"]]), known)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _arguments(class_path: str) -> set[str]:
    found = pydoc.locate(class_path)
    return set(inspect.signature(found).parameters) if callable(found) else set()


def _message(key: str, known: Iterable[str]) -> str:
    known = set(known)
    head, dot, rest = key.partition(".")
    heads = {name.partition(".")[0] for name in known}
    if head in heads:
        near = difflib.get_close_matches(key, known, n=1)
    else:
        near = [name + dot + rest for name in difflib.get_close_matches(head, heads, n=1)]
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{key}: expected a key that there is, got an unknown one. {hint}{_ALL}"
