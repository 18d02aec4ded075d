"""Reliability flags: what in a model, or in what its attacks left behind, makes a robust score hard to believe."""

from robustav.flags.flag import FLAGS, Flag, Meaning
from robustav.flags.model import probe
from robustav.flags.rows import inspect

__all__ = ["FLAGS", "Flag", "Meaning", "inspect", "probe"]
