"""The walls of the house that import-linter cannot state."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "compress").rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]
ENGINES = {"onnxruntime", "openvino", "executorch", "tvm", "ai_edge_litert", "litert_torch", "tokenizers"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_file_is_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_engines_are_imported_inside_the_function_that_needs_them(path: Path) -> None:
    assert ENGINES.isdisjoint(imported_on_load(ast.parse(path.read_text(encoding="utf-8"))))


def test_the_reader_of_imports_tells_load_from_call() -> None:
    source = (
        "import a.b\nif x:\n    from c.d import e\nclass K:\n    import f\ndef g():\n    import h\nfrom . import i\n"
    )
    assert imported_on_load(ast.parse(source)) == {"a", "c", "f"}


@pytest.mark.parametrize("absent", ["pytorch_lightning", "torch_pruning", "torchao", "datasets", "torch"])
def test_the_runtime_imports_where_a_package_is_absent(absent: str) -> None:
    # import-linter sees `from compress.x.y import z` as an import of y alone, but it runs x/__init__.py as well.
    program = (
        f"import importlib, pkgutil, sys; sys.modules[{absent!r}] = None; import compress.runtime as room\n"
        "for entry in pkgutil.walk_packages(room.__path__, room.__name__ + '.'): importlib.import_module(entry.name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def imported_on_load(node: ast.AST) -> set[str]:
    """Return the top-level packages that are imported when a module is, not when a function of it is called."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return set()
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.partition(".")[0]} if node.module and node.level == 0 else set()
    return {name for child in ast.iter_child_nodes(node) for name in imported_on_load(child)}
