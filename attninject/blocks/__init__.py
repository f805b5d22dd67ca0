"""Attention blocks: plain `nn.Module`s that keep their input's shape and know nothing of models.

Each is usable alone: `SE(64)(x)`; `registry` finds and builds them by name.
"""
