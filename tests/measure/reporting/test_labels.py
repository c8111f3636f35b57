from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from compress.measure.reporting.labels import Box, place_labels

FRAME = Box(0, 0, 800, 400)
POINT = st.tuples(st.floats(40, 760), st.floats(40, 360))


@given(points=st.lists(POINT, min_size=1, max_size=6), radius=st.floats(2, 24), width=st.floats(20, 110))
def test_labels_cover_neither_each_other_nor_points(
    points: list[tuple[float, float]], radius: float, width: float
) -> None:
    labels = place_labels(points, [radius] * len(points), [(width, 26.0)] * len(points), FRAME)
    discs = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    assert all(one.overlap(other) < 1e-3 for one, other in itertools.combinations(labels, 2))
    assert all(label.overlap(disc) < 1e-3 for label in labels for disc in discs)
    assert all(abs(label.overlap(FRAME) - label.area) < 1e-3 for label in labels)


def test_where_nothing_is_free_there_is_still_a_place() -> None:
    labels = place_labels([(5, 5)] * 3, [2.0] * 3, [(9.0, 9.0)] * 3, Box(0, 0, 10, 10))
    assert len(labels) == 3


def test_a_label_stands_beside_a_lone_point() -> None:
    (label,) = place_labels([(100, 100)], [10.0], [(50.0, 20.0)], FRAME)
    assert (label.left, label.bottom) == (115.0, 90.0)
