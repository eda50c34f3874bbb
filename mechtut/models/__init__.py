"""Load a language model, name the places inside it, read them and change them."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
