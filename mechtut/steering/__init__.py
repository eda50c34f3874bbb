"""Change what a model says by adding a direction to its states, and know what it cost."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
