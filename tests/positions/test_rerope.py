"""ReRoPE and Leaky ReRoPE against their formula, written out for every pair of tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import checks
import dense
from longspan.apply import apply
from longspan.core.facts import facts_of
from longspan.core.method import parse
from longspan.hf.site import remove
from longspan.positions import near_far
from longspan.positions.rerope import LeakyReRoPE, ReRoPE
from longspan.util.errors import NotSupported, SpecError

CLOSE = {"rtol": 0, "atol": 5e-5}
"""Angles are float32 in transformers and float64 in the judge; a key at a wrong distance moves logits by 1e-2 and more."""

Either = ReRoPE | LeakyReRoPE
METHODS = [ReRoPE(6), ReRoPE(1), ReRoPE(20), LeakyReRoPE(6, 4.0), LeakyReRoPE(5, 1.7), LeakyReRoPE(1, 16.0)]


def distance(method: Either, i: int, j: int) -> float:
    """Su's: true within the window; beyond it the window, and in the leaky form a k-th of the rest."""
    window = method.window or 0
    leak = 1 / (method.factor or 1) if isinstance(method, LeakyReRoPE) else 0.0
    return i - j if i - j < window else window + (i - j - window) * leak


def judge(model: LlamaForCausalLM, ids: Tensor, method: Either, positions: list[int] | None = None) -> Tensor:
    positions = positions or list(range(len(ids)))
    away = torch.tensor([[distance(method, i, j) for j in positions] for i in positions], dtype=torch.float64)
    return dense.logits(model, ids, away[:, :, None] * dense.frequencies(model), dense.causal(len(ids)))


@pytest.fixture(params=[1, 3], ids=["one layer", "three layers"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return dense.llama(layers=request.param)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.spec)
@pytest.mark.parametrize("at_once", [512, 5, 1])
@torch.no_grad()
def test_formula(model: LlamaForCausalLM, method: Either, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, in several, and in blocks of one query."""
    monkeypatch.setattr(near_far, "QUERIES_AT_ONCE", at_once)
    ids = dense.tokens(1, 40)
    expected = judge(model, ids[0], method)
    apply(model, method)
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.spec)
@torch.no_grad()
def test_formula_while_decoding(model: LlamaForCausalLM, method: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single queries take the merged form, chunks that continue a cache take blocks: rows of the same prefill."""
    monkeypatch.setattr(near_far, "QUERIES_AT_ONCE", 4)
    ids, cache, parts = dense.tokens(1, 40), DynamicCache(), []
    expected = judge(model, ids[0], method)
    apply(model, method)
    for part in ids.split([5, 1, 1, 11, 1, 1, 13, 1, 6], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[0], expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS[2:5], ids=lambda m: m.spec)
@pytest.mark.parametrize("at_once", [512, 6])
@torch.no_grad()
def test_positions(model: LlamaForCausalLM, method: Either, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances come from positions: those that skip, as in PoSE, and those of left-padded rows, whatever padding carries."""
    monkeypatch.setattr(near_far, "QUERIES_AT_ONCE", at_once)
    skips = [*range(8), *range(30, 41), *range(90, 101)]
    ids, mask = dense.tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    expected = judge(model, ids[0], method, skips)
    rows = judge(model, ids[0, 11:], method), judge(model, ids[1], method)
    apply(model, method)
    got = model(ids[:1], position_ids=torch.tensor([skips]), attention_mask=mask[:1], use_cache=False)
    torch.testing.assert_close(got.logits[0], expected, **CLOSE)
    mask[0, :11] = 0
    for padding in (0, 1000):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, padding)
        padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(padded[0, 11:], rows[0], **CLOSE)
        torch.testing.assert_close(padded[1], rows[1], **CLOSE)


@pytest.mark.parametrize("method", [ReRoPE(5), LeakyReRoPE(5, 3.0)], ids=lambda m: m.spec)
def test_gradients_of_the_formula(method: Either) -> None:
    model, ids = dense.llama(layers=2), dense.tokens(1, 24)
    checks.gradients_are_those_of(model, ids, judge(model, ids[0], method), method)


@torch.no_grad()
def test_identities(model: LlamaForCausalLM) -> None:
    """k = 1, and a window as long as the input, are plain RoPE; k → ∞ is ReRoPE; all else is neither."""
    ids = dense.tokens(1, 30)
    plain = model(ids).logits
    rectified = apply(model, ReRoPE(6))(ids).logits
    for same, expected in (
        (LeakyReRoPE(6, 1.0), plain),
        (LeakyReRoPE(30, 9.0), plain),
        (ReRoPE(30), plain),
        (LeakyReRoPE(6, 2.0**20), rectified),
    ):
        torch.testing.assert_close(apply(model, same)(ids).logits, expected, **CLOSE)
    leaky = apply(model, LeakyReRoPE(6, 4.0))(ids).logits
    for pair in ((leaky, plain), (leaky, rectified), (rectified, plain)):
        assert (pair[0] - pair[1])[:, -1].abs().max() > 1e-3
    remove(model)
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_input_within_the_neutral_length_is_plain() -> None:
    """A distance of w is w in both forms, so inputs of w + 1 tokens are left alone and those of w + 2 are not."""
    model = dense.llama(layers=1)
    ids = dense.tokens(1, 30)
    plain = model(ids).logits
    for method in (ReRoPE(9), LeakyReRoPE(9, 4.0)):
        assert method.neutral_length() == 10
        got = apply(model, method)(ids).logits
        torch.testing.assert_close(got[:, :10], plain[:, :10], **CLOSE)
        assert (got[:, 10] - plain[:, 10]).abs().max() > 1e-4


@torch.no_grad()
def test_scaled_angles_that_depend_on_the_length() -> None:
    """Frequencies that a rotary module chooses by the largest position are the same for near and for far keys."""
    config = dense.llama(layers=1, window=64).config
    slow, fast = [4.0] * (config.head_dim // 2), [1.0] * (config.head_dim // 2)
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": fast,
        "long_factor": slow,
        "factor": 4.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 16,
    }
    model = LlamaForCausalLM(config).eval().double()
    ids = dense.tokens(1, 40)
    away = torch.tensor([[distance(ReRoPE(6), i, j) for j in range(40)] for i in range(40)], dtype=torch.float64)
    expected = dense.logits(
        model, ids[0], away[:, :, None] * dense.frequencies(model) / 4, dense.causal(40)
    )  # 40 tokens are past 16: the long factors
    torch.testing.assert_close(apply(model, ReRoPE(6))(ids).logits[0], expected, **CLOSE)


@pytest.mark.parametrize(
    ("spec", "length", "resolved"),
    [
        ("rerope", 8192, "rerope:window=1024"),
        ("rerope", None, "rerope:window=1024"),
        ("rerope:window=512", None, "rerope:window=512"),
        ("leaky-rerope", 4096, "leaky-rerope:window=1024,factor=1"),
        ("leaky-rerope", 8192, "leaky-rerope:window=1024,factor=2.34"),
        ("leaky-rerope:window=2k", 65536, "leaky-rerope:window=2048,factor=31.02"),
        ("leaky-rerope:factor=3", None, "leaky-rerope:window=1024,factor=3"),
    ],
)
def test_settings_from_a_target_length(spec: str, length: int | None, resolved: str) -> None:
    facts = facts_of(dense.llama(window=4096).config)
    method = parse(spec).resolve(facts, length)
    assert method.spec == resolved
    assert method.reach(facts) is None or length is None or method.reach(facts) >= length


@pytest.mark.parametrize(("window", "factor"), [(8, 2.0), (8, 1.15), (4, 7.0), (15, 3.3)])
def test_reach_keeps_distances_in_the_window(window: int, factor: float) -> None:
    """The first token of an input of `reach` is within the window of 32, and one token more would leave it."""
    method = LeakyReRoPE(window, factor)
    reach = method.reach(facts_of(dense.llama(window=32).config))
    assert reach is not None
    assert distance(method, reach - 1, 0) <= 31 + 1e-9 < distance(method, reach, 0)
    assert math.isclose(
        float(method.far(torch.tensor(reach - 1), query=True) - method.far(torch.tensor(0), query=False)),
        distance(method, reach - 1, 0),
        rel_tol=1e-6,
    )


def test_refusals() -> None:
    facts = facts_of(dense.llama(window=64).config)
    with pytest.raises(SpecError, match=r"leaky-rerope needs factor=… or a target length"):
        parse("leaky-rerope").resolve(facts, None)
    for name in ("rerope", "leaky-rerope"):
        with pytest.raises(
            NotSupported, match=r"window=64 must be shorter than the model's window of 64.*16, is usual"
        ):
            parse(f"{name}:window=64").resolve(facts, 128)
        with pytest.raises(SpecError, match="window must be at least 1"):
            parse(f"{name}:window=0")
    for factor in ("0.5", "0", "1e9"):
        with pytest.raises(SpecError, match="factor must be from 1 to 1m"):
            parse(f"leaky-rerope:factor={factor}")
