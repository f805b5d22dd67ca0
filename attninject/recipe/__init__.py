"""Text to frozen rules: patterns, YAML read with care, checks with line and column, one report of all faults.

For: everything that can be said of a recipe without a model. Not for: torch, which nothing here imports at the top, nor
for importing, evaluating or fetching what a recipe names.
"""
