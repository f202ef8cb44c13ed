"""Benchmarks, one file each.

The base class is in `base`, scoring of known answers in `answers`, long text in `text`.
"""
