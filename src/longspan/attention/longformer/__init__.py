"""Longformer: the pattern of a layer and its second projections."""

from longspan.attention.longformer.pattern import Longformer

__all__ = ["Longformer"]
