"""How wide each group of units becomes: by a ratio, or so that the network costs what is wanted.

Every allocation is a family of widths that fall as a level rises (``families``). A target is met by looking for the
level at which an estimate of the cost is as wanted (``costs``), and by measuring the network that comes out
(``fitting``).
"""

from compress.prune.allocation.candidates import Candidate, Grid
from compress.prune.allocation.costs import Cost, make_cost
from compress.prune.allocation.families import ALLOCATIONS, allocate
from compress.prune.allocation.fitting import Allocation, fit_to_target
from compress.prune.allocation.targets import Target

__all__ = ["ALLOCATIONS", "Allocation", "Candidate", "Cost", "Grid", "Target", "allocate", "fit_to_target", "make_cost"]
