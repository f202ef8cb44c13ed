"""What a bounded span shows each query, against masks written out for every pair of tokens, through each model's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import checks
import dense
import tiny
from longspan.apply import applied, apply
from longspan.attention.window import Window
from longspan.core.facts import facts_of
from longspan.core.method import parse
from longspan.hf.site import remove
from longspan.positions import spans
from longspan.positions.bca import BlockwiseCausal
from longspan.positions.spans import Span
from longspan.util.errors import NotSupported, SpecError

CLOSE = {"rtol": 0, "atol": 1e-9}
METHODS = [Window(6), Window(1), Window(17), BlockwiseCausal(6), BlockwiseCausal(2), BlockwiseCausal(16)]
NAMES = [m.spec for m in METHODS]


def seen(method: Span, i: int, j: int) -> bool:
    """Whether query i sees key j, by the definitions."""
    size = method.size or 0
    if isinstance(method, Window):
        return 0 <= i - j < size
    return j <= i and i // (size // 2) - j // (size // 2) in (0, 1)


def visible(method: Span, positions: list[int]) -> Tensor:
    return torch.tensor([[seen(method, i, j) for j in positions] for i in positions])


def judge(model: LlamaForCausalLM, ids: Tensor, method: Span, positions: list[int] | None = None) -> Tensor:
    positions = positions or list(range(len(ids)))
    away = torch.tensor([[i - j for j in positions] for i in positions])
    return dense.logits(model, ids, away[:, :, None] * dense.frequencies(model), visible(method, positions))


@pytest.fixture(params=[1, 3], ids=["one layer", "three layers"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return dense.llama(layers=request.param)


@pytest.fixture(params=[512, 7, 1], ids=["one block", "blocks", "blocks of one"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "QUERIES_AT_ONCE", request.param)


# The angles of `judge` are float64 and those of transformers float32, hence the wider bounds there.


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@torch.no_grad()
def test_formula(model: LlamaForCausalLM, method: Span, at_once: None) -> None:
    """In one piece, and in chunks and single tokens, which see the same as the prompt's tokens did."""
    ids, cache, parts = dense.tokens(1, 40), DynamicCache(), []
    expected = judge(model, ids[0], method)
    apply(model, method)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(whole[0], expected, rtol=0, atol=5e-5)
    for part in ids.split([5, 1, 1, 11, 1, 1, 13, 1, 6], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@torch.no_grad()
def test_rows_of_different_length(model: LlamaForCausalLM, method: Span, at_once: None) -> None:
    """Left-padded rows see what they see alone, in one piece and token by token, whatever position padding carries."""
    ids, mask = dense.tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    apply(model, method)
    alone = model(ids[:1, 11:]).logits[0], model(ids[1:]).logits[0]
    for padding in (0, 1, 1000):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, padding)
        cache, parts = DynamicCache(), []
        for end in (14, 15, 16, 30):
            part = slice(cache.get_seq_length(), end)
            arguments = {"attention_mask": mask[:, :end], "position_ids": positions[:, part]}
            parts.append(model(ids[:, part], past_key_values=cache, **arguments).logits)
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for got in (whole, torch.cat(parts, dim=1)):
            torch.testing.assert_close(got[0, 11:], alone[0], **CLOSE)
            torch.testing.assert_close(got[1], alone[1], **CLOSE)


@pytest.mark.parametrize("method", [Window(9), BlockwiseCausal(8)], ids=lambda m: m.spec)
@torch.no_grad()
def test_positions_with_jumps(model: LlamaForCausalLM, method: Span, at_once: None) -> None:
    """Positions that skip, as in PoSE: what is far in positions is not seen. The mask of ones keeps them one document."""
    positions = [*range(8), *range(10, 21), *range(90, 101)]
    ids = dense.tokens(1, len(positions))
    expected = judge(model, ids[0], method, positions)
    apply(model, method)
    got = model(ids, position_ids=torch.tensor([positions]), attention_mask=torch.ones_like(ids), use_cache=False)
    torch.testing.assert_close(got.logits[0], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", [Window(5), BlockwiseCausal(6)], ids=lambda m: m.spec)
def test_gradients_of_the_formula(method: Span, at_once: None) -> None:
    model, ids = dense.llama(layers=2), dense.tokens(1, 24)
    checks.gradients_are_those_of(model, ids, judge(model, ids[0], method), method)


# The model's own attention does the work.


def biased(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **known: Tensor
) -> tuple[Tensor, None]:
    """An attention whose scores fall with distance, as a model of a user's might register it."""
    places = known["position_ids"]
    keys = known.get("key_positions", places)
    bias = -0.3 * (places[:, None, :, None] - keys[:, None, None, :]).to(query.dtype)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    bias = bias.masked_fill(~mask, float("-inf"))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.fixture
def biased_attention() -> Iterator[str]:
    AttentionInterface.register("biased", biased)
    AttentionMaskInterface.register("biased", AttentionMaskInterface()["sdpa"])
    yield "biased"
    del AttentionInterface._global_mapping["biased"], AttentionMaskInterface._global_mapping["biased"]


def neox() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(**sizes, intermediate_size=64, max_position_embeddings=32, bos_token_id=0, eos_token_id=0)
    return GPTNeoXForCausalLM(config).eval().double()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "biased"])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("make", [lambda: dense.llama(layers=2), neox], ids=["llama", "gpt-neox"])
@torch.no_grad()
def test_it_is_the_model_under_a_mask(
    make: Callable[[], PreTrainedModel],
    method: Span,
    implementation: str,
    biased_attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Given the mask in four dimensions, the plain model gives the same, whatever its attention does to scores."""
    monkeypatch.setattr(spans, "QUERIES_AT_ONCE", 16)
    close = {"rtol": 0, "atol": 1e-5} if implementation == "eager" else CLOSE  # eager attention's softmax is float32
    model, ids = make(), dense.tokens(2, 40)
    plain = model(ids).logits
    model.set_attn_implementation(implementation)
    band = visible(method, list(range(40)))[None, None].expand(2, -1, -1, -1)
    if implementation == "eager":
        band = torch.zeros_like(band, dtype=torch.float64).masked_fill(~band, torch.finfo(torch.float64).min)
    stock, expected = model(ids).logits, model(ids, attention_mask=band).logits
    assert implementation != "biased" or (stock - plain).abs().max() > 1e-3
    with applied(model, method):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **close)
        cache = DynamicCache()
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, **close)
    assert torch.equal(model(ids).logits, stock)


@torch.no_grad()
def test_it_is_plain_within_its_size(model: LlamaForCausalLM) -> None:
    """And where the span sees all, the model's attention runs as before, without a mask."""
    ids = dense.tokens(1, 30)
    plain = model(ids).logits
    for same in (Window(30), BlockwiseCausal(30)):
        assert same.neutral_length() == 30
        assert torch.equal(apply(model, same)(ids).logits, plain)
    for other in (Window(29), BlockwiseCausal(28)):
        assert not torch.allclose(apply(model, other)(ids).logits[:, -1], plain[:, -1])
    remove(model)
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_the_window_is_streaming_without_sinks(model: LlamaForCausalLM) -> None:
    """Which keeps as many keys as it sees; and with one layer, though not with more, the window's text read alone."""
    ids = dense.tokens(2, 40)
    got = apply(model, Window(9))(ids).logits
    torch.testing.assert_close(apply(model, "streaming:sinks=0,window=9")(ids).logits, got, **CLOSE)
    remove(model)
    alone = (model(ids[:, -9:]).logits[:, -1] - got[:, -1]).abs().max()
    assert alone < 5e-5 if len(model.model.layers) == 1 else alone > 1e-2


@pytest.mark.parametrize("method", [Window(6), BlockwiseCausal(12)], ids=lambda m: m.spec)
@torch.no_grad()
def test_layers_that_look_back_less_far(method: Span, at_once: None) -> None:
    """Both limits hold at once, also where the cache has dropped what the layer no longer sees."""
    config = MistralConfig(
        **tiny.sizes(96, 48, 64, 2, 4, 2),
        sliding_window=10,
    )
    ids, cache = dense.tokens(1, 40), DynamicCache(config=config)
    model = MistralForCausalLM(config).eval().double()
    both = visible(method, list(range(40))) & (dense.distances(40) < 10)
    expected = model(ids, attention_mask=both[None, None]).logits
    apply(model, method)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 11, 1, 1, 13, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    assert cache.layers[0].keys.shape[2] < 10


# Refusals and settings.


@pytest.mark.parametrize("name", ["window", "bca"])
def test_refusals(name: str) -> None:
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 96}
    absolute = GPT2LMHeadModel(GPT2Config(**small))
    with pytest.raises(NotSupported, match=r"GPT2LMHeadModel adds absolute positions.*use a model with RoPE"):
        apply(absolute, f"{name}:size=6")
    sliding = facts_of(MistralConfig(sliding_window=10, max_position_embeddings=64, num_hidden_layers=1))
    with pytest.raises(NotSupported, match=r"sees the last 10 tokens only, so size=64 changes nothing"):
        parse(name).resolve(sliding)
    assert parse(f"{name}:size=8").resolve(sliding).spec == f"{name}:size=8"
    with pytest.raises(SpecError, match="size must be"):
        parse(f"{name}:size=0")
    with pytest.raises(NotSupported, match=f"{name} and logn cannot be combined: both take the model's span"):
        parse(f"{name} + logn")


@pytest.mark.parametrize("name", ["window", "bca", "logn"])
def test_an_attention_that_takes_no_mask(name: str, biased_attention: str) -> None:
    """Such as FlashAttention, which is told of padding alone."""
    AttentionMaskInterface.register(biased_attention, AttentionMaskInterface()["flash_attention_2"])
    model = dense.llama()
    model.set_attn_implementation(biased_attention)
    with pytest.raises(NotSupported, match=r"'biased' takes none; load the model with attn_implementation=\"sdpa\""):
        apply(model, name)
    assert model.config._attn_implementation == "biased"


def test_settings() -> None:
    facts = facts_of(dense.llama(window=33).config)
    assert parse("window").resolve(facts).spec == "window:size=33"
    assert parse("bca").resolve(facts).spec == "bca:size=32"
    assert parse("bca").resolve(facts).reach(facts) is None
    with pytest.raises(SpecError, match="size must be an even number of tokens, two blocks, not 7"):
        parse("bca:size=7")


def test_sinks_are_for_models_of_our_own(model: LlamaForCausalLM) -> None:
    with pytest.raises(NotSupported, match="streaming:sinks=4,window=9"):
        apply(model, "window:size=9,sinks=4")
    with pytest.raises(SpecError, match="sinks"):
        parse("window:size=9,sinks=-1")
