"""Longformer: window attention with global tokens, which have projections of their own."""

from longspan.attention.longformer.pattern import Longformer

__all__ = ["Longformer"]
