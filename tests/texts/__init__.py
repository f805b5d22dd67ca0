"""Everything that attninject says, one text per case: `tests/reference/texts.txt` holds what it said before."""

from . import commands, files, models, names, plans, recipes, training  # they register their cases
from .registry import read, write

__all__ = ["commands", "files", "models", "names", "plans", "read", "recipes", "training", "write"]
