"""Words with few values, as types: an editor completes them, and a checker finds a slip. Imports nothing of ours."""

from __future__ import annotations

from typing import Literal

Position = Literal["after", "before", "replace"]
"""Where a block stands: behind a call or operation, on its result; in front of it, on an operand; in a module's place."""

Mechanism = Literal["graph", "module"]
"""How a block is called: within the rewritten forward of the site's owner, or around its carrier's forward."""

Slot = Literal["free", "attribute", "module"]
"""What a block's name held before: nothing, an attribute that is None, or a child registered as None."""

ProbeMode = Literal["meta", "fake", "real"]
"""What the stand-ins of a recorded run are made of: `meta` tensors, `fake` ones (on their device), `real` copies."""
