"""Run thousands of interventions exactly, recomputing only what each of them can change."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
