"""Fast forms: blocks as hand-derived gradients that move and keep fewer bytes. GRADIENTS.md derives them.

The readable definition of a block is its `transform`; its `fast_transform` calls this room. `dispatch` says
which of the two runs, `function` how the Functions work together, `primitives` what they are made of.
"""
