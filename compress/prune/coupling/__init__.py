"""Which slices of which parameters must go together, read off an exported graph.

The graph is run once on labels instead of numbers (``walk``): shape operators move labels by running themselves,
operators in which values meet unite them (``combine``), and what cannot be removed is protected, with a reason.
"""

from compress.prune.coupling.groups import Coupling, Group, find_coupling, read_coupling, read_labels
from compress.prune.coupling.program import static_graph
from compress.prune.coupling.resize import resize

__all__ = ["Coupling", "Group", "find_coupling", "read_coupling", "read_labels", "resize", "static_graph"]
