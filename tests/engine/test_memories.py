"""Attention over a local context and a stored memory against one softmax over all keys, in float64, and what a store holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.engine.retrieval import memories
from longspan.engine.retrieval.memories import Earlier, Store

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memories, "BLOCK", 5)


def drawn(heads: int, length: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, length, WIDTH, dtype=torch.float64, generator=g)


def filled(key: Tensor, value: Tensor, pieces: list[int], offload: bool = False) -> Store:
    store = Store(offload)
    for k, v in zip(key.split(pieces, dim=2), value.split(pieces, dim=2), strict=True):
        store.append(k, v)
    return store


def formula(query: Tensor, near: Tensor, far: Tensor, values: Tensor, k: int | None) -> Tensor:
    """One softmax over the memory's scores, of which only the `k` best count, and the causal ones of the local keys."""
    scores = far if k is None else far.masked_fill(far < far.topk(k).values[..., -1:], -torch.inf)
    causal = torch.ones(near.shape[-2:], dtype=torch.bool).tril(near.shape[-1] - near.shape[-2])
    joined = torch.cat((scores, near.masked_fill(~causal, -torch.inf)), dim=-1)
    return joined.softmax(-1) @ values.repeat_interleave(HEADS // KV_HEADS, 1)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("other", [False, True])
def test_one_softmax_over_store_late_and_local(k: int | None, softcap: float | None, other: bool) -> None:
    query, far = drawn(HEADS, 4, 0), drawn(HEADS, 4, 1) if other else None
    key, value = (drawn(KV_HEADS, 13 + 3 + 6, seed) for seed in (2, 3))
    store = filled(key[:, :, :13], value[:, :, :13], [1, 7, 5])
    memory = Earlier(store, slice(0, 2), 0, (key[:, :, 13:16], value[:, :, 13:16]), 16)
    local = key[:, :, 16:], value[:, :, 16:]
    if k is None:
        got = memories.attend(query, *local, memory, SCALE, softcap=softcap, far=far)
    else:
        got = memories.attend_nearest(query, *local, memory, k, SCALE, softcap=softcap, far=far)
    keys = key.repeat_interleave(HEADS // KV_HEADS, 1)
    asked = query if far is None else far
    scores = [query @ keys[:, :, 16:].mT * SCALE, asked @ keys[:, :, :16].mT * SCALE]
    near, before = scores if softcap is None else [softcap * torch.tanh(s / softcap) for s in scores]
    torch.testing.assert_close(got, formula(query, near, before, value, k), rtol=1e-12, atol=1e-12)


def test_a_row_begins_behind_its_padding() -> None:
    query, key, value = drawn(HEADS, 2, 0), drawn(KV_HEADS, 12, 1), drawn(KV_HEADS, 12, 2)
    store = filled(key[:, :, :9], value[:, :, :9], [9])
    one = slice(1, 2)
    nothing = key[one, :, :0], value[one, :, :0]
    got = memories.attend(query[one], key[one, :, 9:], value[one, :, 9:], Earlier(store, one, 4, nothing, 5), SCALE)
    keys = key[one].repeat_interleave(2, 1)
    scores = query[one] @ keys.mT * SCALE
    wanted = formula(query[one], scores[..., 9:], scores[..., 4:9], value[one, :, 4:], None)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pieces", [[17], [1] * 17, [2, 9, 6], [5, 5, 5, 2]])
@pytest.mark.parametrize("offload", [False, True])
def test_a_store_holds_what_it_was_given(pieces: list[int], offload: bool) -> None:
    key, value = drawn(KV_HEADS, 17, 0), drawn(KV_HEADS, 17, 1)
    store = filled(key, value, pieces, offload)
    whole = store.whole()
    assert whole is not None and torch.equal(whole[0], key) and torch.equal(whole[1], value)
    assert store.length == 17 == sum(size for _, size in store.parts())
    assert store.nbytes <= (17 + memories.BLOCK) * 2 * key[:, :, :1].nbytes


def test_a_copy_goes_on_by_itself() -> None:
    key, value = drawn(KV_HEADS, 12, 0), drawn(KV_HEADS, 12, 1)
    store = filled(key[:, :, :7], value[:, :, :7], [7])
    first, second = store.copy(), store.copy()
    first.append(key[:, :, 7:], value[:, :, 7:])
    second.append(-key[:, :, 7:], -value[:, :, 7:])
    assert store.length == 7
    for made, sign in ((first, 1), (second, -1)):
        whole = made.whole()
        assert whole is not None
        assert torch.equal(whole[0], torch.cat((key[:, :, :7], sign * key[:, :, 7:]), dim=2))


def test_gradients_are_those_of_one_softmax() -> None:
    query, key, value = (x.requires_grad_() for x in (drawn(HEADS, 3, 0), drawn(KV_HEADS, 9, 1), drawn(KV_HEADS, 9, 2)))
    memory = Earlier(None, slice(0, 2), 0, (key[:, :, :6], value[:, :, :6]), 6)
    got = memories.attend(query, key[:, :, 6:], value[:, :, 6:], memory, SCALE)
    scores = query @ key.repeat_interleave(2, 1).mT * SCALE
    wanted = formula(query, scores[..., 6:], scores[..., :6], value, None)
    weight = drawn(HEADS, 3, 5)
    grads = [torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (got, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
