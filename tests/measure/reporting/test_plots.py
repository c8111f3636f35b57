from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from compress.measure.reporting.plots import picture_svg, training_svg, widths_svg
from tests.measure.samples import rows, sample_report


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_labels_each_stage() -> None:
    svg = picture_svg(sample_report())
    written = " ".join(texts(svg))
    for words in ["teacher", "8.00 ms · 4.00 MB", "int8 artefact", "0.500 ms · 100 kB", "test accuracy, %"]:
        assert words in written


def test_labels_of_equal_points_do_not_share_a_place() -> None:
    report = sample_report()
    for stage in report.stages:
        stage.metrics, stage.latency = {"accuracy": 0.9}, rows("eager", 1.0, 2.0)
    svg = picture_svg(report)
    names = [stage.name for stage in report.stages]
    places = re.findall(r"<text[^>]*?(?:translate\(([^)]*)\)|x=\"([^\"]*)\" y=\"([^\"]*)\")[^>]*>([^<]*)</text>", svg)
    found = {text: (first, x, y) for first, x, y, text in places if text in names}
    assert len(set(found.values())) == len(names)


def test_a_stage_without_figures_is_left_out() -> None:
    report = sample_report()
    report.stages[1].latency = []
    report.stages[2].metrics = {"accuracy": math.nan}
    written = texts(picture_svg(report))
    assert "teacher" in written
    assert not {"pruned", "int8 artefact"} & set(written)
    report.stages = report.stages[1:]
    assert picture_svg(report) == ""


def test_training_has_a_panel_a_metric_and_survives_nan() -> None:
    curves = sample_report().curves | {
        "student: val/loss": [[1, math.nan], [2, math.nan]],
        "student: prune/ratio": [[1, 0.5]],
        "student: val/f1": [],
    }
    written = texts(training_svg(curves, first="accuracy"))
    titles = [text for text in written if "/" in text]
    assert titles == ["val/accuracy", "val/loss", "train/loss", "prune/ratio"]
    assert {"teacher", "student"} <= set(written)
    assert training_svg({}) == ""


def test_widths_name_layers_and_figures() -> None:
    written = texts(widths_svg(sample_report().widths))
    assert {"conv1", "32 → 20", "fc", "10"} <= set(written)
    assert widths_svg([]) == ""


def test_dollars_are_no_formulas() -> None:
    assert "a$_{$b" in texts(widths_svg([{"layer": "a$_{$b", "before": 2, "after": 1}]))


def test_colours_are_the_pages() -> None:
    report = sample_report()
    for svg in (picture_svg(report), training_svg(report.curves), widths_svg(report.widths)):
        assert "var(--" in svg
        assert not re.search(r"(?:fill|stroke|color)[:=]\s*\"?#", svg)


def test_the_same_figures_give_the_same_picture() -> None:
    assert picture_svg(sample_report()) == picture_svg(sample_report())
