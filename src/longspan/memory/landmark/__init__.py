"""Landmark attention: its method, its cache, and documents that were read."""

from longspan.memory.landmark.method import Landmark, Memory, load, read, save

__all__ = ["Landmark", "Memory", "load", "read", "save"]
