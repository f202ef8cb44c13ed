"""The reference by hand, and the form that the methods call against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.engine.core import attention, expand_heads, reference_attention


def inputs(
    heads: int = 4, kv_heads: int = 2, queries: int = 5, keys: int = 7, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = (2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 8)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_by_hand(softcap: float | None) -> None:
    query, key, value = inputs()
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[..., 0] = True
    out = reference_attention(query, key, value, mask, 0.3, softcap)
    for b, h, i in ((0, 0, 0), (1, 3, 4), (0, 2, 1)):
        seen = [j for j in range(7) if mask[b, 0, i, j]]
        scores = [0.3 * float(query[b, h, i] @ key[b, h // 2, j]) for j in seen]
        scores = [softcap * math.tanh(s / softcap) for s in scores] if softcap else scores
        weights = [math.exp(s) / sum(map(math.exp, scores)) for s in scores]
        torch.testing.assert_close(
            out[b, h, i], sum(w * value[b, h // 2, j] for w, j in zip(weights, seen, strict=True))
        )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["all", "causal", "mask", "mask for each row"])
def test_attention_is_the_reference(kind: str, kv_heads: int, softcap: float | None) -> None:
    queries = 7 if kind == "causal" else 5
    query, key, value = (x.requires_grad_() for x in inputs(kv_heads=kv_heads, queries=queries))
    mask = {
        "all": torch.ones(5, 7, dtype=torch.bool),
        "causal": torch.ones(7, 7, dtype=torch.bool).tril(),
        "mask": torch.ones(5, 7, dtype=torch.bool).tril(2),
        "mask for each row": torch.ones(2, 1, 5, 7, dtype=torch.bool).tril(torch.tensor(2).item()),
    }[kind]
    given = mask if kind.startswith("mask") else None
    got = attention(query, key, value, given, 0.3, softcap=softcap, causal=kind == "causal")
    want = reference_attention(query, key, value, mask, 0.3, softcap)
    torch.testing.assert_close(got, want)
    for x, y in zip(
        torch.autograd.grad(got.sin().sum(), (query, key, value)),
        torch.autograd.grad(want.sin().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_query_that_sees_nothing_is_zero(softcap: float | None) -> None:
    """And its gradient is: padding must not poison the rows beside it."""
    query, key, value = (x.requires_grad_() for x in inputs())
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, :2] = False
    out = attention(query, key, value, mask, 0.3, softcap=softcap)
    assert (out[0, :, :2] == 0).all() and (out[0, :, 2:] != 0).all()
    for gradient in torch.autograd.grad(out.sum(), (query, key, value)):
        assert gradient.isfinite().all()


def test_softmax_of_16_bit_scores_is_taken_in_32() -> None:
    query, key, value = inputs(dtype=torch.bfloat16)
    mask = torch.ones(5, 7, dtype=torch.bool)
    exact = reference_attention(query.double(), key.double(), value.double(), mask, 0.3)
    for softcap in (None, 1e4):
        out = attention(query, key, value, mask, 0.3, softcap=softcap)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05)


def test_heads_are_repeated_in_groups() -> None:
    x = torch.arange(2.0).reshape(1, 2, 1, 1)
    assert expand_heads(x, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert expand_heads(x, 2) is x
