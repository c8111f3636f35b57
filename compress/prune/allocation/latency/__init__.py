"""Latency on the real engine: a table of single layers that is measured once, and whole networks.

Everything measured is kept in the user's cache folder by machine, engine, threads and versions, so that a fit that is
resumed plans what an uninterrupted one would have planned.
"""

from compress.prune.allocation.latency.cost import LatencyCost
from compress.prune.allocation.latency.multiples import preferred_multiple

__all__ = ["LatencyCost", "preferred_multiple"]
