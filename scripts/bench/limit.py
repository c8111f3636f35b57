"""A limit of processor time, which counts alike on a machine that has other work."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["OutOfTimeError", "processor_time"]


class OutOfTimeError(BaseException):
    """Not an ``Exception``: what is timed may catch those."""


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Stop what runs inside after so many seconds of processor time.

    Raises:
        OutOfTimeError: when it takes longer.
    """

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
