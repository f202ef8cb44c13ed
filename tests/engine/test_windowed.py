"""The block mask against the window's definition, and the joined softmax against one over all keys.

The kernel itself needs a GPU; here FlexAttention's slow form stands in for it.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import dense
from longspan.apply import apply
from longspan.engine.blocks.tables import band
from longspan.engine.core import expand_heads, reference_attention
from longspan.engine.window import rolling_window as windowed
from longspan.memory.streaming import StreamingLLM


def visible(queries: int, keys: int, offset: int, window: int) -> torch.Tensor:
    distance = torch.arange(queries)[:, None] + offset - torch.arange(keys)[None]
    return (distance >= 0) & (distance < window)


@pytest.mark.parametrize(
    ("queries", "keys", "offset", "window"),
    [
        (256, 512, 0, 1),
        (256, 512, 255, 256),
        (512, 640, 100, 129),
        (384, 1024, 640, 300),
        (128, 256, -3, 77),
        (256, 384, 7, 1000),
    ],
)
def test_block_mask_covers_what_is_visible(queries: int, keys: int, offset: int, window: int) -> None:
    """A block that holds a visible pair is visited; a block marked as full holds nothing else."""
    mask = band((queries, keys), window=window, offset=offset, device=torch.device("cpu")).mask()
    blocks = visible(queries, keys, offset, window).reshape(queries // 128, 128, keys // 128, 128).transpose(1, 2)
    some, full = blocks.flatten(2).any(-1), blocks.flatten(2).all(-1)

    def chosen(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(some)
        for row in range(queries // 128):
            out[row, index[0, 0, row, : int(count[0, 0, row])].long()] = True
        return out

    partial, whole = chosen(mask.kv_num_blocks, mask.kv_indices), chosen(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any() and not (whole & ~full).any() and not (some & ~(partial | whole)).any()
    assert (full & whole).sum() == full.sum()


@pytest.mark.parametrize(
    ("queries", "keys", "offset", "window"), [(512, 512, 0, 100), (256, 455, 199, 200), (512, 700, 60, 64)]
)
def test_window_attention(queries: int, keys: int, offset: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windowed, "QUERIES", 256)
    monkeypatch.setattr(windowed, "_compiled", lambda: flex_attention)
    query, key, value = (torch.randn(1, heads, n, 16) for heads, n in ((4, queries), (2, keys), (2, keys)))
    out, lse = windowed.window_attention(query, key, value, offset, window, 0.25)
    seen = visible(queries, keys, offset, window)
    torch.testing.assert_close(out, reference_attention(query, key, value, seen, 0.25), rtol=1e-4, atol=1e-5)
    scores = (query @ expand_heads(key, 4).mT * 0.25).masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-5)


def test_join_is_one_softmax() -> None:
    """Also for rows that see only one of the two sides."""
    scores, values = torch.randn(1, 4, 5, 9), torch.randn(1, 2, 9, 8)
    scores[:, :, 0, :3] = float("-inf")
    scores[:, :, 1, 3:] = float("-inf")
    mine = torch.nan_to_num(scores[..., 3:].softmax(-1)) @ expand_heads(values[:, :, 3:], 4)
    joined = windowed.join(mine, scores[..., 3:].logsumexp(-1), scores[..., :3], values[:, :, :3])
    torch.testing.assert_close(joined, scores.softmax(-1) @ expand_heads(values, 4))


@torch.no_grad()
def test_a_whole_model_on_this_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs for a long prompt, here with small numbers: the same logits as the path for everything else."""
    model = dense.llama(layers=2).float()
    apply(model, StreamingLLM(4, 50))
    ids = dense.tokens(1, 512)
    want = torch.cat(list(_chunks(model, ids)), dim=1)
    calls = []

    def serves(call: object, key: torch.Tensor, reach: int) -> bool:
        calls.append(reach)
        return call.query.shape[2] % 256 == 0 and key.shape[2] > 0

    monkeypatch.setattr(windowed, "QUERIES", 256)
    monkeypatch.setattr(windowed, "_compiled", lambda: flex_attention)
    monkeypatch.setattr(windowed, "serves", serves)
    got = torch.cat(list(_chunks(model, ids)), dim=1)
    assert calls and set(calls) == {50}
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def _chunks(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    first = model(ids[:, :256])
    return [first.logits, model(ids[:, 256:], past_key_values=first.past_key_values).logits]
