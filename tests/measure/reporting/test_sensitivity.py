"""The picture of what each layer's silence costs, alone and in the report."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from compress.measure.reporting.html import render_html
from compress.measure.reporting.report import Sensitivity, Target, read_report, write_report
from compress.measure.reporting.sensitivity import save_sensitivity, sensitivity_svg
from compress.measure.reporting.table import sensitivity_table
from tests.measure.samples import sample_report


def sample(num_layers: int, *, ratios: tuple[float, ...] = (0.25, 0.5, 0.75)) -> Sensitivity:
    """Return curves that fall faster with each layer."""
    curves = {
        f"layer{number}": [
            [ratio, {"loss": 0.1 + number * ratio, "accuracy": 0.9 - 0.8 * ratio * (number + 1) / num_layers}]
            for ratio in (0.0, *ratios)
        ]
        for number in range(num_layers)
    }
    widths = dict.fromkeys(curves, 8)
    return Sensitivity("baseline", "l2", "accuracy", widths, 1 + num_layers * len(ratios), curves)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_layers_are_ranked_by_the_loss_at_half() -> None:
    assert sample(4).ranked() == ["layer3", "layer2", "layer1", "layer0"]
    partly = sample(2)
    partly.curves["layer1"] = partly.curves["layer1"][:1]
    assert partly.ranked() == ["layer0"]


def test_few_layers_are_curves_with_the_most_sensitive_first() -> None:
    written = texts(sensitivity_svg(sample(5)))
    assert [text for text in written if text.startswith("layer")] == [f"layer{number}" for number in range(4, -1, -1)]
    assert {"validation accuracy, %", "validation loss"} <= set(written)


def test_many_layers_are_a_map_in_the_order_of_the_network() -> None:
    written = texts(sensitivity_svg(sample(20)))
    assert [text for text in written if text.startswith("layer")] == [f"layer{number}" for number in range(20)]
    assert any("90.0 with all units" in text for text in written)
    assert written.count("30.0") == 1  # of the last layer with three quarters silent
    crowded = texts(sensitivity_svg(sample(20, ratios=tuple(np.linspace(0.05, 0.95, 10)))))
    assert not [text for text in crowded if re.fullmatch(r"\d+\.\d", text)]


@pytest.mark.parametrize("num_layers", [1, 5, 20])
def test_colours_are_the_pages_and_what_is_not_finite_is_drawn(num_layers: int) -> None:
    measured = sample(num_layers)
    measured.curves["layer0"][-1][1] = {"loss": math.nan, "accuracy": math.nan}
    svg = sensitivity_svg(measured)
    assert "var(--series-" in svg
    assert not re.search(r"(?:fill|stroke|color)[:=]\s*\"?#", svg)


def test_a_metric_that_rises_is_damage_too() -> None:
    measured = sample(20)
    for points in measured.curves.values():
        for _, values in points:
            values["accuracy"] = 1 - values["accuracy"]
    shares = [float(share) for share in re.findall(r"series-4\); opacity: ([\d.]+)", sensitivity_svg(measured))]
    falling = [float(share) for share in re.findall(r"series-4\); opacity: ([\d.]+)", sensitivity_svg(sample(20)))]
    assert len(shares) > 40
    assert shares == pytest.approx(falling, abs=1e-5)


@pytest.mark.parametrize("num_layers", [3, 30])
def test_files_are_pictures(num_layers: int, tmp_path: Path) -> None:
    png, svg = save_sensitivity(sample(num_layers), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sensitivity.png", "sensitivity.svg"}
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert width > 1000
    assert height > 400
    assert imread(png)[..., :3].reshape(-1, 3).std(0).min() > 0.05
    assert "var(--" not in svg.read_text()
    assert "layer2" in texts(svg.read_text())


def test_nothing_measured_is_no_picture(tmp_path: Path) -> None:
    nothing = replace(sample(1), curves={})
    assert sensitivity_svg(nothing) == ""
    assert save_sensitivity(nothing, tmp_path) == []


def test_the_table_has_both_ends() -> None:
    assert sensitivity_table(sample(4)).row_count == 4
    table = sensitivity_table(sample(20), num_rows=3)
    assert [str(cell) for cell in table.columns[0].cells] == [
        *("layer19", "layer18", "layer17"),
        "… 14 more",
        *("layer2", "layer1", "layer0"),
    ]


def test_the_report_has_curves_and_target(tmp_path: Path) -> None:
    report = sample_report()
    before = render_html(report)
    assert "Sensitivity" not in before
    assert "Wanted and reached" not in before
    report.sensitivity = sample(3)
    report.sensitivity.curves["layer2"][-1][1]["loss"] = math.inf
    report.target = Target("latency_ms", 2.0, 1.9, 4.0, "onnxruntime")
    text = write_report(report, tmp_path).read_text()
    assert text.count("<svg") == before.count("<svg") + 1
    for words in (
        "Sensitivity of the layers",
        "layer2",
        "stage baseline",
        "4.00 ms",
        "2.00 ms",
        "1.90 ms",
        "onnxruntime",
    ):
        assert words in text
    assert "so far" not in text
    again = read_report(tmp_path)
    assert again.target == report.target
    assert again.sensitivity is not None
    assert math.isnan(again.sensitivity.curves["layer2"][-1][1]["loss"])
    assert again.sensitivity.curves["layer1"] == report.sensitivity.curves["layer1"]
    report.sensitivity.curves.pop("layer0")
    assert "7 of 10 points so far" in render_html(report)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target("macs", 2e6, 1.5e6), ["MACs", "2.00 M", "1.50 M"]),
        (Target("params", 2e3, 1.5e3), ["parameters", "2.00 k", "1.50 k"]),
        (Target("bytes", 2e3, 1.5e3), ["bytes of weights", "2.00 kB", "1.50 kB"]),
    ],
)
def test_targets_have_their_units(target: Target, words: list[str]) -> None:
    report = sample_report()
    report.target = target
    text = render_html(report)
    section = text[text.index("Wanted and reached") :]
    assert all(word in section for word in words)
