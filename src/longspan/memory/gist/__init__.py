"""Gist tokens: the method, and prompts that were compressed."""

from longspan.memory.gist.method import Gist, compress, load, save

__all__ = ["Gist", "compress", "load", "save"]
