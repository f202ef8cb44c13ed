"""The mixer `linear`: its module against the formula, what it can be combined with, and encoders beside decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import checks
from longspan.attention.linear import elu_plus_one
from longspan.lm import LongspanConfig, LongspanForCausalLM, LongspanForConditionalGeneration
from longspan.lm.modeling import LongspanModel
from longspan.util.errors import NotSupported
from ties import UndefinedAtTies


def config(**settings: Any) -> LongspanConfig:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LongspanConfig(**{**sizes, "num_key_value_heads": 2, "attention": "linear", **settings})


def turned(x: Tensor, start: int = 0) -> Tensor:
    """x (B, H, T, D) under RoPE, in pairs (c, c + D/2), base 10,000."""
    length, width = x.shape[-2:]
    rate = 10_000.0 ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    angle = (start + torch.arange(length, dtype=x.dtype))[:, None] * rate
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


def test_feature_map_is_elu_plus_one_and_never_zero() -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(elu_plus_one(x), torch.nn.functional.elu(x) + 1)
    assert bool((elu_plus_one(torch.tensor([-40.0, -80.0])) > 0).all())
    near = torch.tensor([-1.0, -1e-3, 0.0, 1e-3, 1.0], dtype=torch.float64, requires_grad=True)
    with UndefinedAtTies():
        (slope,) = torch.autograd.grad(elu_plus_one(near).sum(), near)
    torch.testing.assert_close(slope, near.detach().exp().where(near < 0, 1.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_module_is_the_formula(kind: str, position: str) -> None:
    """q and k are turned before φ, and the same weights stand above and below the line."""
    model = LongspanModel(config(kind=kind, position=position)).double().eval()
    attention, x = model.layers[1].self_attn, torch.randn(2, 30, 64, dtype=torch.float64)
    q, k, v = (
        project(x).view(2, 30, -1, 16).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    rotation = None
    if position == "rope":
        rotation = model.rotary_emb(x, torch.arange(30)[None])
        q, k = turned(q), turned(k)
    k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
    weights = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    if kind == "decoder":
        weights = weights.tril()
    wanted = attention.o_proj(((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2))
    got, _ = attention(x, None, rotation, None)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 if position == "rope" else 1e-10)  # angles are float32


def test_encoder_decoder_generates_what_it_computes() -> None:
    model = LongspanForConditionalGeneration(
        config(kind="encoder-decoder", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    ).eval()
    ids = torch.randint(2, 96, (2, 20))
    checks.encoder_decoder_generates_what_it_computes(model, ids, padded=5, new=6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"position": "alibi"}, "bias"),
        ({"position": "xpos"}, "rotate_qk"),
        ({"position": "rope + logn"}, "query_scale"),
        ({"attention_dropout": 0.1}, "hidden_dropout"),
    ],
)
def test_what_would_be_lost_is_refused(settings: dict[str, Any], says: str) -> None:
    for attention in ("linear", "performer:features=16"):
        with pytest.raises(NotSupported, match=says):
            LongspanForCausalLM(config(attention=attention, **settings))


def test_half_precision_model() -> None:
    model = LongspanForCausalLM(config()).eval()
    ids = torch.randint(2, 96, (1, 50))
    with torch.no_grad():
        wanted = model(ids).logits
        got = model.to(torch.bfloat16)(ids).logits
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.1, atol=0.1)
