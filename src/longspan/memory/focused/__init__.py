"""Focused Transformer: its method, its cache, and documents that were read."""

from longspan.memory.document import Memory
from longspan.memory.focused.method import Focused

__all__ = ["Focused", "Memory"]
