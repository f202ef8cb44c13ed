"""Benchmarks, one file each; the base class is in `base`, scoring of known answers in `answers`, long text in `text`."""
