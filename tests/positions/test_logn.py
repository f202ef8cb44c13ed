"""The log-n scale against its formula, alone and over other methods, and what it is for: level entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Llama4ForCausalLM, Llama4TextConfig, LlamaForCausalLM

import checks
import dense
from longspan.apply import apply
from longspan.core.facts import facts_of
from longspan.core.method import parse
from longspan.hf.call import LayerCall
from longspan.hf.site import remove
from longspan.positions.logn import LogN
from longspan.util.errors import NotSupported, SpecError

CLOSE = {"rtol": 0, "atol": 5e-5}


def factors(length: int, window: int) -> Tensor:
    """max(1, log(i + 1) / log L) for the positions 0 … length - 1."""
    return torch.tensor([max(1.0, math.log(i + 1) / math.log(window)) for i in range(length)], dtype=torch.float64)


def judge(model: LlamaForCausalLM, ids: Tensor, window: int, rectified: int | None = None) -> Tensor:
    """Plain attention, or ReRoPE's with its window at `rectified`, with scaled queries."""
    away = dense.distances(len(ids)).clamp(max=rectified or len(ids))
    angles = away[:, :, None] * dense.frequencies(model)
    return dense.logits(model, ids, angles, dense.causal(len(ids)), factors(len(ids), window))


@pytest.fixture(params=[1, 3], ids=["one layer", "three layers"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return dense.llama(layers=request.param)


@pytest.mark.parametrize(
    ("spec", "rectified"),
    [("logn:window=8", None), ("logn:window=8 + rerope:window=6", 6), ("rerope:window=6 + logn:window=8", 6)],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_formula(model: LlamaForCausalLM, spec: str, rectified: int | None, implementation: str) -> None:
    """In one piece, in chunks, token by token, and in a left-padded row: by true positions."""
    ids, cache, parts = dense.tokens(2, 40), DynamicCache(), []
    expected, shorter = judge(model, ids[0], 8, rectified), judge(model, ids[1, 11:], 8, rectified)
    model.set_attn_implementation(implementation)
    apply(model, spec)
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], expected, **CLOSE)
    for part in ids[:1].split([5, 1, 1, 11, 1, 1, 13, 1, 6], dim=1):
        parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[0], expected, **CLOSE)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[0], expected, **CLOSE)
    torch.testing.assert_close(padded[1, 11:], shorter, **CLOSE)


def test_gradients_of_the_formula() -> None:
    model, ids = dense.llama(layers=2), dense.tokens(1, 24)
    checks.gradients_are_those_of(model, ids, judge(model, ids[0], 5), LogN(5))


@torch.no_grad()
def test_positions_within_the_window_are_left_as_they_are(model: LlamaForCausalLM) -> None:
    """Bit for bit, up to the L-th token; the one after it is scaled."""
    ids = dense.tokens(1, 30)
    plain = model(ids).logits
    got = apply(model, LogN(12))(ids).logits
    assert torch.equal(got[:, :12], plain[:, :12])
    assert not torch.allclose(got[:, 12], plain[:, 12])
    remove(model)
    assert torch.equal(model(ids).logits, plain)


def test_published_figures() -> None:
    """L = 4,096: the factor is 1 up to L, 1.083 at twice, 1.167 at four times and 1.417 at 32 times as many keys."""
    positions = torch.tensor([[0, 4095, 8191, 16383, 32767, 131071]])
    one = torch.zeros(1, 1, 6, 2)
    call = LayerCall(one, one, one, 1.0, module=torch.nn.Identity(), position_ids=positions)
    expected = torch.tensor([1, 1, 1.083333, 1.166667, 1.25, 1.416667])
    torch.testing.assert_close(LogN(4096).scale(call)[0, 0, :, 0], expected)


def test_entropy_stays_more_level() -> None:
    """Over 512 to 32,768 unrelated keys the entropy of plain attention grows with log n; scaled, by much less."""
    torch.manual_seed(0)
    entropy: dict[bool, list[float]] = {False: [], True: []}
    for n in (512, 2048, 8192, 32768):
        scores = 3 * torch.randn(64, n, dtype=torch.float64)
        for scaled, values in entropy.items():
            weights = (scores * factors(n, 512)[-1] if scaled else scores).softmax(-1)
            values.append(float(-(weights * weights.clamp_min(1e-300).log()).sum(-1).mean()))
    plain, level = (max(values) - min(values) for values in (entropy[False], entropy[True]))
    assert plain > 3 and level < plain / 2


def test_settings_and_refusals() -> None:
    facts = facts_of(dense.llama(window=64).config)
    assert parse("logn").resolve(facts).spec == "logn:window=64"
    assert parse("logn").resolve(facts).reach(facts) == 64
    assert parse("logn + rerope").resolve(facts).reach(facts) is None
    for text in ("0", "1", "-4"):
        with pytest.raises(SpecError, match="window must be at least 2 tokens"):
            parse(f"logn:window={text}")
    for bounded in ("streaming", "window", "bca"):
        with pytest.raises(NotSupported, match=r"both take the model's span. .*combines with: .*rerope"):
            parse(f"logn + {bounded}")
    for other in ("ntk:factor=2", "dynamic-ntk", "self-extend:group=2", "rerope", "leaky-rerope:factor=2"):
        assert parse(f"{other} + logn").spec.endswith(" + logn")


@pytest.mark.parametrize("spec", ["logn:window=8", "window:size=9", "yarn:factor=2"])
def test_a_model_that_hands_its_attention_no_positions(spec: str) -> None:
    """Llama 4, whose chunked layers keep fewer keys than they have seen: positions are the forward's, in pieces and padded."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96}
    kinds = {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 12,
        "no_rope_layers": [1, 0],
    }
    torch.manual_seed(0)
    config = Llama4TextConfig(**sizes, **kinds, moe_layers=[], num_local_experts=2, pad_token_id=0, eos_token_id=None)
    model = Llama4ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
    apply(model, spec)
    ids, mask = dense.tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids[:1, 7:], use_cache=False).logits[0], model(ids[1:], use_cache=False).logits[0]
        cache, parts, at = DynamicCache(config=config), [], 0
        for size in (9, 1, 1, 5, 1, 13):
            part = {"attention_mask": mask[:, : at + size], "position_ids": places[:, at : at + size]}
            parts.append(model(ids[:, at : at + size], past_key_values=cache, **part).logits)
            at += size
        whole = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    for got in (whole, torch.cat(parts, dim=1)):
        torch.testing.assert_close(got[0, 7:], alone[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], alone[1], rtol=1e-4, atol=1e-4)
