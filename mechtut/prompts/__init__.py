"""Prompts and what is known about their tokens: subjects and their noise, few-shot tasks, facts, completions."""

from mechtut._packages import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __path__)
