"""Every architecture of torchvision and timm, put through the guarantees; the rows behind `attninject zoo`.

For: sweeps over whole model zoos. Not for: anything that another room needs; nobody but `cli` imports it.
"""
