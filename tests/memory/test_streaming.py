"""StreamingLLM against dense attention over the kept tokens, for any cut of the input, padding and cache operation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

import dense
from longspan.apply import applied, apply
from longspan.core.facts import facts_of
from longspan.core.method import parse
from longspan.hf.compat import CACHE
from longspan.hf.rolling import StreamingLayer, streaming_cache
from longspan.memory import streaming
from longspan.memory.streaming import StreamingLLM
from longspan.util.errors import NotSupported, SpecError

SINKS, WINDOW, LENGTH = 4, 16, 60
CLOSE = {"rtol": 0, "atol": 5e-5}
"""Angles are float32 in transformers and float64 in the judge; a key at a wrong distance moves logits by 1e-2 and more."""


def judge(model: LlamaForCausalLM, ids: Tensor, sinks: int, window: int) -> Tensor:
    """Each token sees the sinks at the distance that they have in its cache and the window at the true one."""
    at = torch.arange(len(ids))
    away = dense.distances(len(ids))
    is_sink = (at < sinks)[None]
    in_cache = torch.where(is_sink, at.clamp(max=sinks + window - 1)[:, None] - at[None], away)
    visible = (away >= 0) & (is_sink | (away < window))
    return dense.logits(model, ids, in_cache[:, :, None] * dense.frequencies(model), visible)


def cut(ids: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, int]]:
    """The first pieces of `ids` with the number of tokens up to each one's end."""
    end = 0
    for size in sizes:
        end += size
        yield ids[:, end - size : end], end


def in_pieces(model: LlamaForCausalLM, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    cache = DynamicCache()
    return torch.cat(
        [
            model(part, past_key_values=cache, attention_mask=None if mask is None else mask[:, :end]).logits
            for part, end in cut(ids, sizes)
        ],
        dim=1,
    )


def left_padded(pads: list[int], length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """(ids, mask) of rows that start with so much padding."""
    ids = dense.tokens(len(pads), length)
    return ids, (torch.arange(length) >= torch.tensor(pads)[:, None]).long()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return dense.llama(layers=3)


# What is computed.


@torch.no_grad()
def test_each_step_is_the_stock_model_on_the_kept_tokens() -> None:
    """One layer: the last logits of a stock model that is given the sinks and the last tokens at positions 0, 1, 2, …"""
    stock, model, ids = dense.llama(), dense.llama(), dense.tokens(1, LENGTH)
    apply(model, StreamingLLM(SINKS, WINDOW))
    steps = in_pieces(model, ids, [1] * LENGTH)[0]
    for t in range(LENGTH):
        kept = [j for j in range(t + 1) if j < SINKS or j > t - WINDOW]
        assert len(kept) <= SINKS + WINDOW
        torch.testing.assert_close(steps[t], stock(ids[:, kept], use_cache=False).logits[0, -1], **CLOSE)


@pytest.mark.parametrize(
    ("sinks", "window"), [(4, 16), (1, 1), (4, 1), (1, 30), (0, 8), (0, 1), (20, 3), (70, 5), (3, 100)]
)
@pytest.mark.parametrize("at_once", [1024, 7])
@torch.no_grad()
def test_formula(
    model: LlamaForCausalLM, sinks: int, window: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three layers; one forward in one block and in several, decoding, and chunks."""
    monkeypatch.setattr(streaming, "QUERIES_AT_ONCE", at_once)
    ids = dense.tokens(1, LENGTH)
    expected = judge(model, ids[0], sinks, window)
    apply(model, StreamingLLM(sinks, window))
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], expected, **CLOSE)
    torch.testing.assert_close(model(ids).logits[0], expected, **CLOSE)
    if at_once == 7:
        torch.testing.assert_close(in_pieces(model, ids, [1] * LENGTH)[0], expected, **CLOSE)
    else:
        torch.testing.assert_close(in_pieces(model, ids, [2, 1, 3, 1, 9, 1, 1, 20, 1, 2, 19])[0], expected, **CLOSE)


def test_gradients_of_the_formula() -> None:
    model, ids = dense.llama(layers=2), dense.tokens(1, 40)

    def gradients(logits: Tensor) -> list[Tensor]:
        return torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))

    expected = gradients(judge(model, ids[0], 3, 7))
    apply(model, StreamingLLM(3, 7))
    for use_cache in (False, True):
        for got, want in zip(gradients(model(ids, use_cache=use_cache).logits), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_reach_sinks_of_padded_rows() -> None:
    """With a cache and padding, sinks are gathered: they must stay part of the graph."""
    model = dense.llama(layers=2)
    apply(model, StreamingLLM(3, 7))
    ids, mask = left_padded([9, 0], 40)

    def gradients(**arguments: object) -> list[Tensor]:
        out = model(ids, attention_mask=mask, **arguments).logits
        return torch.autograd.grad((out * mask[..., None]).logsumexp(-1).sum(), list(model.parameters()))

    for got, want in zip(gradients(use_cache=True), gradients(use_cache=False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_before_anything_is_evicted_it_is_the_plain_model(model: LlamaForCausalLM) -> None:
    ids = dense.tokens(2, SINKS + WINDOW + 1)
    plain = model(ids).logits
    apply(model, StreamingLLM(SINKS, WINDOW))
    for got in (model(ids).logits, in_pieces(model, ids, [1] * ids.shape[1])):
        torch.testing.assert_close(got[:, :-1], plain[:, :-1], rtol=0, atol=1e-5)
        assert (got - plain)[:, -1].abs().max() > 1e-3


LEARNED = dense.llama(layers=2)
TRUE: dict[tuple[int, int, int], Tensor] = {}


@st.composite
def cuts(draw: st.DrawFn) -> list[int]:
    """Sizes that add up to LENGTH: runs of single tokens and chunks."""
    ends = draw(st.sets(st.integers(1, LENGTH - 1), max_size=LENGTH - 1))
    edges = [0, *sorted(ends), LENGTH]
    return [end - start for start, end in itertools.pairwise(edges)]


@given(sizes=cuts(), sinks=st.integers(0, 6), window=st.integers(1, 24), pad=st.integers(0, 50))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_cut_gives_the_same(sizes: list[int], sinks: int, window: int, pad: int) -> None:
    """Chunks of any size, shorter than the padding too; a row's padding changes nothing for it or for its neighbour."""
    ids, mask = left_padded([pad, 0])
    with torch.no_grad(), applied(LEARNED, StreamingLLM(sinks, window)):
        got = in_pieces(LEARNED, ids, sizes, mask)
        for row, start in ((0, pad), (1, 0)):
            alone = LEARNED(ids[row : row + 1, start:], use_cache=False).logits[0]
            torch.testing.assert_close(got[row, start:], alone, **CLOSE)


# What is kept.


@torch.no_grad()
def test_the_cache_stays_as_large_as_it_is(model: LlamaForCausalLM) -> None:
    apply(model, StreamingLLM(SINKS, WINDOW))
    ids, cache, sizes = dense.tokens(1, 10 * (SINKS + WINDOW)), DynamicCache(), []
    for part, end in cut(ids, [7, *[1] * 50, 143]):
        model(part, past_key_values=cache)
        assert cache.get_seq_length() == end
        kept = [x for layer in cache.layers for x in (layer.keys, layer.values, layer.sink_keys)]
        sizes.append(sum(x.untyped_storage().nbytes() for x in kept))
    width = 2 * 12 * 8  # heads, channels, bytes of float64
    assert set(sizes) == {3 * width * (2 * (SINKS + WINDOW) + SINKS)}


@torch.no_grad()
def test_a_new_cache_comes_back(model: LlamaForCausalLM) -> None:
    apply(model, StreamingLLM(SINKS, WINDOW))
    ids = dense.tokens(1, LENGTH)
    cache = model(ids[:, :30]).past_key_values
    assert isinstance(cache, Cache) and all(isinstance(layer, StreamingLayer) for layer in cache.layers)
    got = model(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids).logits[:, 30:], **CLOSE)
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("prompt", [9, 30], ids=["nothing evicted", "evicted"])
@torch.no_grad()
def test_rows_change_places(model: LlamaForCausalLM, prompt: int) -> None:
    """What beam search does: rows are repeated, chosen and swapped."""
    apply(model, StreamingLLM(SINKS, WINDOW))
    ids, mask = left_padded([6, 0])
    whole, cache = model(ids, attention_mask=mask, use_cache=False).logits, DynamicCache()

    def goes_on(rows: list[int], start: int, sizes: list[int]) -> None:
        for part, end in cut(ids[rows, start:], sizes):
            got = model(part, past_key_values=cache, attention_mask=mask[rows, : start + end]).logits
            torch.testing.assert_close(got, whole[rows, start + end - part.shape[1] : start + end], **CLOSE)

    goes_on([0, 1], 0, [prompt, 1])
    cache.reorder_cache(torch.tensor([1, 0]))
    goes_on([1, 0], prompt + 1, [1, 1, 3])
    cache.batch_repeat_interleave(2)
    goes_on([1, 1, 0, 0], prompt + 6, [1, 4, 1])
    cache.batch_select_indices(torch.tensor([2]))
    goes_on([0], prompt + 12, [1, 1, 5, 1])


@torch.no_grad()
def test_reset_forgets_everything(model: LlamaForCausalLM) -> None:
    apply(model, StreamingLLM(SINKS, WINDOW))
    cache = DynamicCache()
    ids, mask = left_padded([6, 0])
    for part, end in cut(ids, [30, *[1] * 30]):
        model(part, past_key_values=cache, attention_mask=mask[:, :end])
    cache.reset()
    assert cache.get_seq_length() == 0
    other = dense.tokens(2, LENGTH, seed=1)
    got = torch.cat([model(part, past_key_values=cache).logits for part in other.split([30, *[1] * 30], dim=1)], dim=1)
    torch.testing.assert_close(got, model(other, use_cache=False).logits, **CLOSE)


@torch.no_grad()
def test_crop(model: LlamaForCausalLM) -> None:
    apply(model, StreamingLLM(SINKS, WINDOW))
    ids, cache = dense.tokens(1, LENGTH), DynamicCache()
    whole = model(ids, use_cache=False).logits
    model(dense.tokens(1, SINKS + WINDOW, seed=2), past_key_values=cache)
    cache.crop(-(SINKS + WINDOW))
    assert cache.get_seq_length() == 0
    model(torch.cat((ids[:, :2], dense.tokens(1, 9, seed=3)), dim=1), past_key_values=cache)
    cache.crop(-9)
    for part, end in cut(ids[:, 2:], [1, 1, 1, *[1] * 20, 35]):
        got = model(part, past_key_values=cache).logits
        torch.testing.assert_close(got, whole[:, 2 + end - part.shape[1] : 2 + end], **CLOSE)
    cache.crop(0)
    with pytest.raises(NotSupported, match="cannot be brought back"):
        cache.crop(-1)
    with pytest.raises(NotSupported, match="negative"):
        cache.crop(5)


# Padding.


@pytest.mark.parametrize(
    "sizes", [[12, *[1] * 28], [1] * 40, [40], [5, 5, 5, 25]], ids=["decode", "steps", "whole", "chunks"]
)
@torch.no_grad()
def test_rows_shorter_than_the_sinks(model: LlamaForCausalLM, sizes: list[int]) -> None:
    """One row of a single token, one shorter than the sinks, one full: no row is not a number, each is as if alone."""
    apply(model, StreamingLLM(SINKS, 6))
    pads = [11, 10, 0]
    ids, mask = left_padded(pads, 40)
    for got in (in_pieces(model, ids, sizes, mask), model(ids, attention_mask=mask, use_cache=False).logits):
        assert got.isfinite().all()
        for row, pad in enumerate(pads):
            torch.testing.assert_close(got[row, pad:], model(ids[row : row + 1, pad:]).logits[0], **CLOSE)


@torch.no_grad()
def test_padding_on_the_right_without_a_cache(model: LlamaForCausalLM) -> None:
    """As in training: what follows a row's end is not seen by it."""
    apply(model, StreamingLLM(SINKS, WINDOW))
    ids, mask = dense.tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, 29:] = 0
    got = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[0, :29], model(ids[:1, :29]).logits[0], **CLOSE)
    torch.testing.assert_close(got[1], model(ids[1:]).logits[0], **CLOSE)


# Refusals.


def test_other_caches(model: LlamaForCausalLM) -> None:
    ids = dense.tokens(1, 8)
    filled = DynamicCache()
    model(ids, past_key_values=filled)
    apply(model, StreamingLLM(SINKS, WINDOW))
    with pytest.raises(NotSupported, match=rf"DynamicCache with tokens in it.*Pass {CACHE}=None"):
        model(ids, past_key_values=filled)
    with pytest.raises(NotSupported, match=r"StaticCache.*DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(NotSupported, match="StaticCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    cache = model(ids).past_key_values
    apply(model, StreamingLLM(SINKS, WINDOW + 1))
    with pytest.raises(NotSupported, match=r"4 \+ 16 tokens.*start a new cache"):
        model(ids, past_key_values=cache)


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows])


def test_rows_padded_on_the_right_are_not_cached(model: LlamaForCausalLM) -> None:
    apply(model, StreamingLLM(SINKS, WINDOW))
    with pytest.raises(NotSupported, match="padding_side = 'left'"):
        model(dense.tokens(2, 8), attention_mask=mask_of("11111100", "11111111"))


@pytest.mark.parametrize("use_cache", [True, False])
def test_masks_with_holes(model: LlamaForCausalLM, use_cache: bool) -> None:
    """A token that is hidden between others would be seen."""
    apply(model, StreamingLLM(SINKS, WINDOW))
    with pytest.raises(NotSupported, match="not between"):
        model(dense.tokens(2, 8), attention_mask=mask_of("00110111", "11111111"), use_cache=use_cache)


def test_masks_of_another_shape(model: LlamaForCausalLM) -> None:
    apply(model, StreamingLLM(SINKS, WINDOW))
    with pytest.raises(NotSupported, match="2-D attention mask"):
        model(dense.tokens(1, 8), attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize(
    "later",
    [mask_of("1111111100", "1111111111"), mask_of("0011111111", "1111111111"), mask_of("1110011111", "1111111111")],
)
def test_masks_that_hide_what_was_read(model: LlamaForCausalLM, later: Tensor) -> None:
    """A second turn whose rows are padded again, or a mask that comes too late."""
    apply(model, StreamingLLM(SINKS, WINDOW))
    cache, ids = DynamicCache(), dense.tokens(2, 10)
    model(ids[:, :5], past_key_values=cache)
    with pytest.raises(NotSupported, match=r"left|between"):
        model(ids[:, 5:], past_key_values=cache, attention_mask=later)


def test_settings_out_of_range() -> None:
    for spec in ("streaming:window=0", "streaming:sinks=-1", "streaming:window=1e12", "streaming:sinks=1m"):
        with pytest.raises(SpecError, match="streaming"):
            parse(spec)


def test_what_it_promises() -> None:
    facts, method = facts_of(dense.llama().config), StreamingLLM(4, 16)
    assert method.reach(facts) is None and not method.exportable
    assert method.cache_tokens(facts, 10**6) == 20 == method.cache_tokens(facts, 7)
    assert [layer.get_seq_length() for layer in streaming_cache(3, 4, 16).layers] == [0, 0, 0]


def test_a_cache_goes_on_in_any_mode(model: LlamaForCausalLM) -> None:
    """Filled under inference mode and read on without it, and the other way round, rows chosen between."""
    apply(model, StreamingLLM(SINKS, WINDOW))
    ids, cache = dense.tokens(2, LENGTH), DynamicCache()
    whole = model(ids, use_cache=False).logits.detach()
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad)
    for number, (part, end) in enumerate(cut(ids, [3, 1, 9, 1, 1, 12, 1, 1, 15, 1, 1, 14])):
        with modes[number % 3]():
            cache.reorder_cache(torch.tensor([0, 1]))
            got = model(part, past_key_values=cache).logits
            torch.testing.assert_close(got, whole[:, end - part.shape[1] : end], **CLOSE)
