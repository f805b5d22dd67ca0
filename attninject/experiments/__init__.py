"""Experiments that the command line runs: the demo and the benchmarks."""
