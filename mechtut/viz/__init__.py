"""Figures: static ones with matplotlib, interactive ones that work without a network."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
