"""Figures as a reader wants them: three digits and a unit."""

from __future__ import annotations

import math

__all__ = ["ABSENT", "as_bytes", "as_count", "as_metric", "as_ms", "as_points", "as_ratio"]

ABSENT = "\N{EN DASH}"
_TIMES, _MINUS = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"


def as_count(value: float | None) -> str:
    """Write a count with a decimal prefix.

    Example:
        >>> as_count(1_234_567), as_count(999_999), as_count(12), as_count(None)
        ('1.23 M', '1.00 M', '12', '–')
    """
    if value is None:
        return ABSENT
    return _scaled(value, ["", "k", "M", "G", "T"]).strip()


def as_bytes(value: float | None) -> str:
    """Write a number of bytes in powers of 1,000, as disks are sold.

    Example:
        >>> as_bytes(92_400), as_bytes(512)
        ('92.4 kB', '512 B')
    """
    return ABSENT if value is None else _scaled(value, ["B", "kB", "MB", "GB", "TB"])


def as_ms(value: float | None) -> str:
    """Write milliseconds, without the unit.

    Example:
        >>> as_ms(0.01234), as_ms(3.14159), as_ms(1234.5)
        ('0.0123', '3.14', '1234')
    """
    return ABSENT if value is None else _three_digits(value)


def as_metric(value: float | None) -> str:
    """Write a fraction in per cent.

    Example:
        >>> as_metric(0.97254)
        '97.25 %'
    """
    return ABSENT if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def as_points(value: float | None) -> str:
    """Write a difference in points, with its sign.

    Example:
        >>> as_points(-0.4251), as_points(0.001)
        ('−0.43', '±0.00')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    sign = "±" if abs(value) < 0.005 else "+" if value > 0 else _MINUS
    return f"{sign}{abs(value):.2f}"


def as_ratio(value: float | None, *, better: str, worse: str) -> tuple[str, str]:
    """Write a gain as a factor of at least one and the word that says which way it goes.

    Example:
        >>> as_ratio(12.34, better="smaller", worse="larger"), as_ratio(0.5, better="smaller", worse="larger")
        (('12.3×', 'smaller'), ('2.00×', 'larger'))
    """
    if value is None:
        return ABSENT, better
    factor, word = (value, better) if value >= 1 else (1 / value, worse)
    return f"{_three_digits(factor)}{_TIMES}", word


def _scaled(value: float, units: list[str]) -> str:
    step = 0
    # 999.5 would be written as 1000 in three digits.
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.0f} {units[0]}" if step == 0 else f"{_three_digits(value)} {units[step]}"


def _three_digits(value: float) -> str:
    if not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded value: 0.9995 is written as 1.00
    return f"{value:.{max(0, 2 - exponent)}f}"
