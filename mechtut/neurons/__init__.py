"""What makes a neuron fire: activation records, explanations, and scores of how well those predict it."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
