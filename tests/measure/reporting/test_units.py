from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from compress.measure.reporting.units import as_bytes, as_count, as_metric, as_ms, as_points, as_ratio

FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@given(st.integers(0, 10**14))
def test_three_digits_say_the_count(value: int) -> None:
    digits, _, unit = as_count(value).partition(" ")
    assert abs(float(digits) * FACTORS[unit] - value) <= 0.0051 * value
    assert unit == "T" or float(digits) < 1000


def test_edges() -> None:
    assert [as_bytes(value) for value in (0, 999, 1000, 999_499, 999_500, None)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "999 kB",
        "1.00 MB",
        "\N{EN DASH}",
    ]
    assert (as_metric(math.nan), as_metric(1.0), as_ms(0.0), as_ms(None)) == (
        "\N{EN DASH}",
        "100.00 %",
        "0",
        "\N{EN DASH}",
    )
    assert (as_points(0.004), as_points(1.0), as_points(-1.0), as_points(None)) == (
        "±0.00",
        "+1.00",
        "\N{MINUS SIGN}1.00",
        "\N{EN DASH}",
    )
    assert as_ratio(1.0, better="b", worse="w") == ("1.00\N{MULTIPLICATION SIGN}", "b")
    assert as_ratio(None, better="b", worse="w") == ("\N{EN DASH}", "b")
