from __future__ import annotations

import re
from html.parser import HTMLParser

from compress.measure.reporting.html import render_html
from tests.measure.samples import sample_report

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_it_all() -> None:
    page = Page(render_html(sample_report()))
    for words in [
        "40.0\N{MULTIPLICATION SIGN}",
        "smaller on disk",
        "16.0\N{MULTIPLICATION SIGN}",
        "faster at batch 1",
        "\N{MINUS SIGN}0.75",
        "points of accuracy",
    ]:
        assert words in page.text
    for words in [
        "onnxruntime",
        "4.00 MB → 100 kB",
        "900 kB",
        "One seed.",
        "Some CPU",
        "seed 3",
        "recipes/digits.yaml",
    ]:
        assert words in page.text
    assert page.tags.count("svg") == 3
    assert page.tags.count("tr") == 2 + 4


def test_the_page_needs_nothing_else() -> None:
    text = render_html(sample_report())
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_text_is_escaped() -> None:
    report = sample_report()
    report.recipe = report.command = report.notes[0] = report.stages[0].name = EVIL
    report.task_metric = EVIL
    report.machine, report.curves = {EVIL: EVIL}, {f"{EVIL}: {EVIL}": [[1, 1.0]]}
    for stage in report.stages:
        stage.metrics = {EVIL: 0.5}
    report.widths[0]["layer"] = EVIL
    text = render_html(report)
    assert "<script" not in text.lower()
    assert text.count("&lt;script") > 8


def test_a_bare_report_has_no_empty_sections() -> None:
    report = sample_report()
    report.curves, report.widths, report.machine, report.notes = {}, [], {}, []
    for stage in report.stages:
        stage.latency, stage.metrics = [], {}
    page = Page(render_html(report))
    assert re.findall(r"Stages|Training|Widths|Machine|How it was", page.text) == ["Stages"]
    assert "not measured" in page.text
