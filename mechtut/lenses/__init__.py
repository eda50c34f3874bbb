"""What a state of the residual stream already says: lenses, and what each part of a model adds to a logit."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
