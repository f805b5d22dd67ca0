"""Measurements: time, memory and accuracy beside peers and plain fine-tuning, printed by `attninject bench` and `demo`.

For: every figure that the documentation quotes. Not for: anything that another room needs; nobody but `cli` imports it.
"""
