"""The embedded model: the invented world it knows, the text it was trained on, its training and its evaluation."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
