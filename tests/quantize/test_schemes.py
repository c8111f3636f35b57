from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.quantize import SCHEMES, Scheme, get_scheme, register
from compress.quantize.layers import engine_mistakes, make_assignment, read_assignment, write_assignment
from compress.quantize.schemes import table

NAMES = ["stem", "stages.0.conv", "stages.1.conv", "fc"]


def names(chosen: dict[str, Scheme]) -> dict[str, str]:
    return {layer: scheme.name for layer, scheme in chosen.items()}


@pytest.mark.parametrize("weights", range(2, 9))
@pytest.mark.parametrize("activations", range(2, 9))
def test_low_bits_by_name(weights: int, activations: int) -> None:
    scheme = get_scheme(f"w{weights}a{activations}")
    assert (scheme.weight_bits, scheme.activation_bits, scheme.symmetric) == (weights, activations, False)


@pytest.mark.parametrize("name", ["w1a8", "w9a8", "w4a1", "w4", "a8", "w4a8 ", "int4", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"quantize\.scheme: expected one of .*int8_portable, .* or w4a8 and the like"
    ):
        get_scheme(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 1}, r"odd\.weight_bits: expected 2 to 8 or none, got 1"),
        ({"activation_bits": 9}, r"odd\.activation_bits: expected 2 to 8, 16 or none, got 9"),
        ({"weight_bits": None}, r"odd\.weight_bits: expected bits where activations have some \(8\), got none"),
        ({"number": "posit"}, r"odd\.number: expected int or float, got 'posit'"),
        ({"number": "float", "weight_bits": 4}, r"odd\.weight_bits: expected 8 bits of weights and activations"),
        ({"dynamic": True, "activation_bits": 4}, r"odd\.dynamic: expected 8-bit integers as activations, got 4"),
        ({"dynamic": True}, r"odd\.linear_only: expected true for a dynamic scheme"),
        ({"group_size": 1}, r"odd\.group_size: expected at least 2, of integers, got 1"),
    ],
)
def test_schemes_that_cannot_be(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Scheme("odd", "", **arguments)  # type: ignore[arg-type]


def test_where_no_engine_has_kernels_none_are_asked_for() -> None:
    assert get_scheme("int8").has_kernels
    assert get_scheme("w4a8").has_kernels
    assert not any(get_scheme(name).has_kernels for name in ("int8_dynamic", "int8_weights", "int16x8", "fp8"))


@pytest.mark.parametrize(
    ("scheme", "layers", "wanted"),
    [
        ("int8", {}, True),
        ("int8", {"fc": "float"}, True),
        ("float", {"stem": "int8"}, True),
        ("int8_weights", {"stem": "w4a8"}, True),
        ("int8_weights", {"stem": "float"}, False),
        ("fp8", {"stem": "int8"}, False),  # together, they run in PyTorch alone
        ("int8", {"stem": "int16x8"}, False),
    ],
)
def test_kernels_are_asked_for_where_any_layer_has_some(scheme: str, layers: dict[str, str], wanted: bool) -> None:
    assignment = make_assignment(scheme, layers=layers)
    assert assignment.has_kernels == wanted


def test_a_scheme_of_the_users_own() -> None:
    mine = Scheme("mine", "3 bits", weight_bits=3, symmetric=True)
    try:
        assert register(mine) is register(mine) is get_scheme("mine")
        with pytest.raises(RecipeError, match="expected a name of its own, got 'mine'"):
            register(Scheme("mine", "another"))
        with pytest.raises(RecipeError, match="expected a name of its own, got 'w4a8'"):
            register(Scheme("w4a8", "what is a pattern's already"))
    finally:
        SCHEMES.pop("mine")


def test_first_and_last_layer_keep_eight_bits_where_others_have_few() -> None:
    assert names(make_assignment("w4a4").resolve(NAMES)) == dict(zip(NAMES, ["int8", "w4a4", "w4a4", "int8"]))
    assert names(make_assignment("int8").resolve(NAMES)) == dict.fromkeys(NAMES, "int8")
    assert names(make_assignment("w4a4", first_last="w4a4").resolve(NAMES)) == dict.fromkeys(NAMES, "w4a4")
    assert names(make_assignment("int8", first_last="float").resolve(NAMES))["stem"] == "float"


def test_the_last_pattern_counts_and_patterns_come_before_ends() -> None:
    assignment = make_assignment(
        "w4a8", layers={"stages.*": "w2a8", "stages.1.*": "int8", "stem": "w3a8"}, keep=["stages.0.*"]
    )
    assert names(assignment.resolve(NAMES)) == dict(zip(NAMES, ["w3a8", "float", "int8", "int8"]))


@pytest.mark.parametrize("given", [{"layers": {"sages.*": "int8"}}, {"keep": ["sages.*"]}])
def test_a_pattern_that_matches_nothing_is_refused_with_the_names(given: dict[str, dict[str, str]]) -> None:
    message = re.escape("got 'sages.*'. The layers are: stem, stages.0.conv, stages.1.conv, fc.")
    with pytest.raises(RecipeError, match=message):
        make_assignment("int8", **given).resolve(NAMES)  # type: ignore[arg-type]


def test_written_down_with_its_schemes() -> None:
    """A scheme of the user's need not be registered where a checkpoint is read."""
    mine = Scheme("mine", "3 bits", weight_bits=3, first_last="int8")
    assignment = make_assignment(mine, layers={"fc": "w2a8"}, keep=["stem"])
    assert read_assignment(write_assignment(assignment)) == assignment
    once = replace(make_assignment("int8", keep=["fc"]), embeddings=False)  # which stayed in floats then
    assert read_assignment({"scheme": "int8", "keep": ["fc"]}) == once


def test_the_readme_lists_them() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (listed,) = re.findall(r"<!-- schemes -->\n(.*?)\n<!-- /schemes -->", readme, re.DOTALL)
    assert listed.splitlines() == list(table())


@pytest.mark.parametrize(
    ("scheme", "targets", "unknown"),
    [
        ("fp8", ["eager", "aoti"], "aoti"),
        ("int8_weights", ["eager", "onnxruntime", "tensorrt"], "tensorrt"),
        ("int16x8", ["aoti", "onnxruntime"], "aoti, onnxruntime"),
    ],
)
def test_engines_that_do_not_know_a_scheme_are_named(scheme: str, targets: list[str], unknown: str) -> None:
    message = f"export.targets: expected engines that run the scheme {scheme!r} (eager"
    for assignment in (make_assignment(scheme), make_assignment("int8", layers={"fc": scheme})):
        (mistake,) = engine_mistakes(assignment, targets)
        assert mistake.startswith(message)
        assert f"got {unknown}. Leave them out" in mistake
    assert not list(engine_mistakes(make_assignment("int8"), targets))
