"""Which pages are retrieved where scores are equal; what is retrieved is held to loops in tests/memory/test_landmark.py."""

from __future__ import annotations

import torch

from longspan.engine.retrieval.landmarks import _NONE, _ranked


def test_pages_are_ranked_by_integers_without_ties() -> None:
    """Apple's GPUs have no float64, and in float32 large scores would be equal again."""
    scores = torch.tensor([3e4, 0.5, 0.5003, -torch.inf, 0.502, 3e4, -2.0])
    ranked = _ranked(scores)
    assert ranked.dtype == torch.int64 and ranked.argsort().tolist() == [3, 6, 1, 2, 4, 0, 5]
    assert ranked[3] == _NONE and len(set(ranked.tolist())) == len(scores)
    many = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 20
    steps = (many.double() * 1024).round() * 2**22 + torch.arange(200)
    assert _ranked(many).tolist() == steps.long().tolist()
