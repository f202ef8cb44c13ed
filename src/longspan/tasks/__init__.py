"""Benchmarks: one file each; the base class and what tasks share are in `base` and `text`."""
