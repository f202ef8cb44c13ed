"""Dynamic NTK against recomputation: each token as the last of a model whose base belongs to the length read so far."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import dense
from longspan.apply import apply
from longspan.core.facts import RopeFacts
from longspan.core.method import parse
from longspan.positions.dynamic_ntk import DynamicNTK
from longspan.util.errors import NotSupported, SpecError

WINDOW = 16
CLOSE = {"rtol": 0, "atol": 1e-5}
CUTS = [3, 1, 1, 9, 1, 1, 1, 12, 1, 10]


def base(length: int, factor: float, width: int = 12, plain: float = 1e4) -> float:
    """transformers' rule: alpha = f·l/L - (f - 1), base times alpha^(d/(d-2)); at factor 1 the paper's s = l/L."""
    alpha = max(1.0, factor * length / WINDOW - (factor - 1))
    return plain * alpha ** (width / (width - 2))


def length_of(position: int, step: int) -> int:
    """The length whose base the query at `position` takes."""
    length = WINDOW
    while length < position + 1:
        length += step
    return length


def judge(model: LlamaForCausalLM, ids: Tensor, factor: float, step: int) -> Tensor:
    """Every query and the keys it sees turned by the query's own base."""
    bases = torch.tensor([base(length_of(i, step), factor) for i in range(len(ids))], dtype=torch.float64)
    frequencies = bases[:, None] ** (-torch.arange(0, 12, 2) / 12)
    angles = dense.distances(len(ids))[:, :, None] * frequencies[:, None]
    return dense.logits(model, ids, angles, dense.causal(len(ids)))


@torch.no_grad()
def test_each_token_as_the_last_of_a_stock_model() -> None:
    """One layer: what a stock model with the base of length l says after l tokens."""
    model, ids = dense.llama(window=WINDOW), dense.tokens(1, 40)
    expected = []
    for length in range(1, 41):
        parameters = {"rope_type": "default", "rope_theta": base(length, 1.0)}
        stock = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "rope_parameters": parameters})).double()
        stock.load_state_dict(model.state_dict())
        expected.append(stock(ids[:, :length]).logits[0, -1])
    apply(model, "dynamic-ntk:step=1")
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], torch.stack(expected), **CLOSE)


@pytest.mark.parametrize(("factor", "step"), [(1.0, 1), (2.0, 1), (1.0, 4), (3.5, 5), (1.0, 512)])
@torch.no_grad()
def test_formula(factor: float, step: int) -> None:
    """Three layers, in one forward and in pieces."""
    model, ids = dense.llama(layers=3, window=WINDOW), dense.tokens(1, 40)
    expected = judge(model, ids[0], factor, step)
    apply(model, DynamicNTK(factor, step))
    torch.testing.assert_close(model(ids, use_cache=False).logits[0], expected, **CLOSE)
    cache = DynamicCache()
    pieces = [model(part, past_key_values=cache).logits for part in ids.split(CUTS, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[0], expected, **CLOSE)


@torch.no_grad()
def test_rows_take_the_base_of_their_own_length() -> None:
    model, ids = dense.llama(layers=2, window=WINDOW), dense.tokens(2, 36)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    expected = judge(model, ids[0, 13:], 1.0, 4), judge(model, ids[1], 1.0, 4)
    apply(model, "dynamic-ntk:step=4")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, pieces, end = DynamicCache(), [], 0
    for size in (5, 14, 1, 1, 14, 1):
        part, end = slice(end, end + size), end + size
        more = {"attention_mask": mask[:, :end], "position_ids": positions[:, part], "past_key_values": cache}
        pieces.append(model(ids[:, part], **more).logits)
    for got in (whole, torch.cat(pieces, dim=1)):
        torch.testing.assert_close(got[0, 13:], expected[0], **CLOSE)
        torch.testing.assert_close(got[1], expected[1], **CLOSE)


def test_gradients_of_the_formula() -> None:
    model, ids = dense.llama(layers=2, window=WINDOW), dense.tokens(1, 30)

    def gradients(logits: Tensor) -> list[Tensor]:
        return torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))

    expected = gradients(judge(model, ids[0], 1.0, 4))
    apply(model, "dynamic-ntk:step=4")
    for got, want in zip(gradients(model(ids, use_cache=False).logits), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_within_the_window_it_is_the_plain_model() -> None:
    model, ids = dense.llama(layers=3, window=WINDOW), dense.tokens(1, WINDOW + 1)
    plain = model(ids).logits
    apply(model, "dynamic-ntk:step=1,factor=4")
    got = model(ids).logits
    torch.testing.assert_close(got[:, :WINDOW], plain[:, :WINDOW], rtol=0, atol=1e-5)
    assert (got - plain)[:, WINDOW].abs().max() > 1e-3


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("length", [4096, 4097, 8192, 12288])
def test_frequencies_equal_transformers(factor: float, length: int) -> None:
    """At the ends of steps, where both mean the same length."""
    rope = RopeFacts(theta=1e4, dim=128, type="default", window=4096, per_layer_type=False)
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": factor}
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128, "max_position_embeddings": 4096}
    theirs, scale = ROPE_INIT_FUNCTIONS["dynamic"](
        LlamaConfig(rope_parameters=parameters, **sizes), None, seq_len=length
    )
    ours = DynamicNTK(factor).inverse_frequencies(rope, length)
    torch.testing.assert_close(theirs.double(), torch.tensor(ours, dtype=torch.float64), rtol=3e-6, atol=0)
    assert scale == 1


def test_lengths_round_up_past_the_window() -> None:
    lengths = DynamicNTK(step=4).lengths(torch.tensor([0, 15, 16, 19, 20, 23, 24]), 16)
    assert lengths.tolist() == [16, 16, 20, 20, 24, 24, 28]


def test_refusals() -> None:
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    config = LlamaConfig(**{**dense.llama().config.to_dict(), "rope_parameters": scaled})
    with pytest.raises(NotSupported, match=r"linear scaling already. Use none, or streaming"):
        apply(LlamaForCausalLM(config), "dynamic-ntk")
    for spec in ("dynamic-ntk:step=0", "dynamic-ntk:factor=0.5", "dynamic-ntk:factor=1e9"):
        with pytest.raises(SpecError, match="must be from 1 to"):
            parse(spec)
