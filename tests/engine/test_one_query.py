"""The decoding kernel against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from longspan.engine.core import reference_attention
from longspan.engine.one_query import one_query_attention, serves


def test_only_one_query_in_16_bit_on_cuda() -> None:
    query, key = torch.zeros(1, 9, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 3, 40, 64, dtype=torch.bfloat16)
    assert not serves(query, key)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "size", "width"),
    [
        (1, 9, 3, 2048, 64),
        (1, 9, 3, 17, 64),
        (1, 9, 3, 1, 64),
        (2, 32, 8, 1000, 128),
        (64, 8, 8, 333, 32),
        (2, 71, 1, 4000, 64),
        (1, 8, 1, 5000, 256),
    ],
)
def test_equals_the_reference(batch: int, heads: int, kv_heads: int, size: int, width: int, dtype: torch.dtype) -> None:
    query = torch.randn(batch, heads, 1, width, device="cuda", dtype=dtype)
    ring = torch.randn(2, 3, batch, kv_heads, size, width, device="cuda", dtype=dtype)
    key, value = ring[0, 1], ring[1, 2]  # as the rings of all layers lie in one tensor
    assert serves(query, key)
    mask = torch.ones(1, size, dtype=torch.bool, device="cuda")
    wanted = reference_attention(query.double(), key.double(), value.double(), mask, 0.1)
    for _ in range(3):  # each call leaves the counters as it found them
        got = one_query_attention(query, key, value, 0.1)
        torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-3)
