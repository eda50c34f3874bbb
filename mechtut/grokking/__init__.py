"""Networks that memorise and then understand: training them, and measures of what they compute."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
