"""A model as a graph of heads and MLPs: cut edges, score them, search for the circuit of a task."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
