"""What an absent package's error tells the user to type."""

from __future__ import annotations

from compress.errors import MissingPackageError


def test_an_extra_is_installed_from_the_checkout_and_not_from_pypi() -> None:
    said = str(MissingPackageError("litserve", "serve"))
    assert said.endswith("Install it with: pip install -e '.[serve]' (in the checkout of compress).")


def test_a_package_that_compress_itself_needs_is_installed_by_its_own_name() -> None:
    assert str(MissingPackageError("onnx")).endswith("Install it with: pip install onnx.")
