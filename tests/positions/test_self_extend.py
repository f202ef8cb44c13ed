"""Self-Extend against the paper's formula, written out for every pair of tokens in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import dense
from longspan.apply import apply
from longspan.core.facts import facts_of
from longspan.core.method import parse
from longspan.hf.site import remove
from longspan.positions import near_far
from longspan.positions.self_extend import SelfExtend
from longspan.util.errors import NotSupported, SpecError

CLOSE = {"rtol": 0, "atol": 5e-5}
"""Angles are float32 in transformers and float64 in the judge; a key at a wrong distance moves logits by 1e-2 and more."""


def distance(i: int, j: int, group: int, window: int) -> int:
    """The paper's: true within the window, grouped and shifted beyond it."""
    return i - j if i - j < window else i // group - j // group + window - window // group


def judge(model: LlamaForCausalLM, ids: Tensor, group: int, window: int, positions: list[int] | None = None) -> Tensor:
    positions = positions or list(range(len(ids)))
    away = [[distance(i, j, group, window) for j in positions] for i in positions]
    angles = torch.tensor(away)[:, :, None] * dense.frequencies(model)
    return dense.logits(model, ids, angles, dense.causal(len(ids)))


@pytest.fixture(params=[1, 3], ids=["one layer", "three layers"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return dense.llama(layers=request.param)


@pytest.mark.parametrize(("group", "window"), [(2, 6), (3, 7), (4, 2), (5, 1), (16, 20), (1, 5), (4, 31)])
@pytest.mark.parametrize("at_once", [512, 5, 1])
@torch.no_grad()
def test_formula(
    model: LlamaForCausalLM, group: int, window: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block, in several, and in blocks of one query; groups that divide the window and that do not."""
    monkeypatch.setattr(near_far, "QUERIES_AT_ONCE", at_once)
    ids = dense.tokens(1, 40)
    expected = judge(model, ids[0], group, window)
    apply(model, SelfExtend(group, window))
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], expected, **CLOSE)


@torch.no_grad()
def test_formula_while_decoding(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merged form of single queries, and blocks of a chunk that continues a cache."""
    monkeypatch.setattr(near_far, "QUERIES_AT_ONCE", 4)
    ids, cache, parts = dense.tokens(1, 40), DynamicCache(), []
    expected = judge(model, ids[0], 4, 6)
    apply(model, SelfExtend(4, 6))
    for part in ids.split([5, 1, 1, 11, 1, 1, 13, 1, 6], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[0], expected, **CLOSE)


@pytest.mark.parametrize("at_once", [512, 6])
@torch.no_grad()
def test_positions_with_jumps(model: LlamaForCausalLM, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that skip, as in PoSE: distances come from them. The mask of ones keeps them one document."""
    monkeypatch.setattr(near_far, "QUERIES_AT_ONCE", at_once)
    positions = [*range(8), *range(30, 41), *range(90, 93)]
    ids = dense.tokens(1, len(positions))
    expected = judge(model, ids[0], 4, 6, positions)
    apply(model, SelfExtend(4, 6))
    got = model(ids, position_ids=torch.tensor([positions]), attention_mask=torch.ones_like(ids), use_cache=False)
    torch.testing.assert_close(got.logits[0], expected, **CLOSE)


@pytest.mark.parametrize("at_once", [512, 6])
@torch.no_grad()
def test_rows_of_different_length(model: LlamaForCausalLM, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left-padded rows take their own positions, and padding may carry any."""
    monkeypatch.setattr(near_far, "QUERIES_AT_ONCE", at_once)
    ids = dense.tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    expected = judge(model, ids[0, 11:], 4, 6), judge(model, ids[1], 4, 6)
    apply(model, SelfExtend(4, 6))
    for padding in (0, 1, 1000):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, padding)
        got = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(got[0, 11:], expected[0], **CLOSE)
        torch.testing.assert_close(got[1], expected[1], **CLOSE)


def test_gradients_of_the_formula() -> None:
    """Blocks of double width and the judge agree backward as they do forward."""
    model, ids = dense.llama(layers=2), dense.tokens(1, 24)

    def gradients(logits: Tensor) -> list[Tensor]:
        return torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))

    expected = gradients(judge(model, ids[0], 3, 5))
    apply(model, SelfExtend(3, 5))
    for got, want in zip(gradients(model(ids, use_cache=False).logits), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_it_is_plain_where_it_must_be() -> None:
    model, ids = dense.llama(), dense.tokens(1, 30)
    plain = model(ids).logits
    for same in (SelfExtend(1, 5), SelfExtend(8, 30)):
        apply(model, same)
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-9)
    apply(model, SelfExtend(8, 20))
    assert (model(ids).logits - plain)[:, -1].abs().max() > 1e-3
    remove(model)
    assert torch.equal(model(ids).logits, plain)


def test_published_figures() -> None:
    """W = 1,024, G = 8, L = 4,096: 25,600 tokens at most, and the first token is met at 2,145 by the 10,000th."""
    facts = facts_of(dense.llama(window=4096).config)
    method = SelfExtend(8, 1024)
    assert method.reach(facts) == 25_600
    far = method.far(torch.tensor(9999), query=True) - method.far(torch.tensor(0), query=False)
    assert far == distance(9999, 0, 8, 1024) == 2145


@pytest.mark.parametrize(("group", "window", "length"), [(2, 8, 56), (4, 8, 104), (8, 16, 144), (3, 8, 78)])
def test_reach_keeps_distances_in_the_window(group: int, window: int, length: int) -> None:
    """No distance of an input of `reach` tokens leaves the window of 32."""
    method = SelfExtend(group, window)
    assert method.reach(facts_of(dense.llama(window=32).config)) == length
    assert max(distance(length - 1, j, group, window) for j in range(length)) == 31
    assert distance(length, 0, group, window) == 32


@pytest.mark.parametrize(
    ("spec", "length", "resolved"),
    [
        ("self-extend", 4096, "self-extend:group=1,window=1024"),
        ("self-extend", 8192, "self-extend:group=8,window=1024"),
        ("self-extend", 16384, "self-extend:group=16,window=1024"),
        ("self-extend:window=512", 16384, "self-extend:group=8,window=512"),
        ("self-extend:group=3", None, "self-extend:group=3,window=1024"),
        ("self-extend:group=3,window=100", 10**6, "self-extend:group=3,window=100"),
    ],
)
def test_settings_from_a_target_length(spec: str, length: int | None, resolved: str) -> None:
    facts = facts_of(dense.llama(window=4096).config)
    method = parse(spec).resolve(facts, length)
    assert method.spec == resolved
    if length and "group=3" not in spec:
        assert method.reach(facts) >= length


def test_refusals() -> None:
    facts = facts_of(dense.llama(window=64).config)
    with pytest.raises(SpecError, match="self-extend needs group"):
        parse("self-extend").resolve(facts, None)
    with pytest.raises(NotSupported, match=r"window=64 must be shorter than the model's window of 64.*16, is usual"):
        parse("self-extend:group=2,window=64").resolve(facts, None)
    for spec in ("self-extend:group=0", "self-extend:window=0", "self-extend:group=-1"):
        with pytest.raises(SpecError, match="must be at least 1"):
            parse(spec)
