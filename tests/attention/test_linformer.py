"""Linformer: its formula, the four ways to share, lengths, padding, saving, and the error that falls with k."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.linformer import Linformer, LinformerAttention, Projection
from longspan.lm import (
    LongspanConfig,
    LongspanForCausalLM,
    LongspanForConditionalGeneration,
    LongspanForMaskedLM,
)
from longspan.util.errors import NotSupported, SpecError

SHARES = ("none", "headwise", "kv", "layerwise")


def build(attention: str | list[str] = "linformer:k=8", **settings: Any) -> LongspanForMaskedLM:
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "position": "sinusoidal", "kind": "encoder"}
    return LongspanForMaskedLM(LongspanConfig(**{**sizes, "attention": attention, **settings})).eval()


def layers(model: LongspanForMaskedLM) -> list[LinformerAttention]:
    return [m for m in model.modules() if isinstance(m, LinformerAttention)]


def projections(model: LongspanForMaskedLM) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ".projection." in n}


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("length", [32, 21])
def test_module_is_the_formula(share: str, length: int) -> None:
    """softmax(q (E K)ᵀ / sqrt(d)) F V head by head in float64, forward and backward; short texts take the first columns."""
    model = build(f"linformer:k=8,share={share}").double()
    attention, found = layers(model)[1], projections(model)
    place = "model.layers.0" if share == "layerwise" else "model.layers.1"
    e = found[f"{place}.self_attn.projection.keys"]
    f = found.get(f"{place}.self_attn.projection.values", e)
    assert (f is e) == (share in ("kv", "layerwise"))
    x = torch.randn(2, length, 64, dtype=torch.float64, requires_grad=True)
    heads = []
    for h in range(4):
        q = x @ attention.q_proj.weight[h * 16 : h * 16 + 16].T
        k, v = (x @ p.weight[h // 2 * 16 : h // 2 * 16 + 16].T for p in (attention.k_proj, attention.v_proj))
        mine_e, mine_f = (m[h // 2 if share == "none" else 0, :, :length] for m in (e, f))
        heads.append((q @ (mine_e @ k).mT / 4).softmax(-1) @ (mine_f @ v))
    wanted = attention.o_proj(torch.cat(heads, dim=-1))
    got, _ = attention(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    pull, given = torch.randn_like(got), (x, e, f, attention.k_proj.weight)
    ours = torch.autograd.grad((got * pull).sum(), given)
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), given), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", SHARES)
def test_whole_projection_is_full_attention(share: str) -> None:
    model, full = build(f"linformer:k=32,share={share}").double(), build("full").double()
    weights = {n: p for n, p in model.state_dict().items() if ".projection." not in n}
    full.load_state_dict(weights)
    for weight in projections(model).values():
        weight.data[:] = torch.eye(32)
    ids = tokens(2, 32)
    torch.testing.assert_close(model(ids).logits, full(ids).logits, rtol=1e-10, atol=1e-10)


def test_numbers_of_matrices() -> None:
    """The paper's count for twelve layers: 24, 12 and 1; and of each head's own, 24 of every head."""
    for share, count in (("headwise", 24), ("kv", 12), ("layerwise", 1), ("none", 24 * 4)):
        model = build(f"linformer:k=8,share={share}", num_hidden_layers=12, num_key_value_heads=4)
        assert sum(p.numel() for p in projections(model).values()) == count * 8 * 32


@pytest.mark.parametrize("share", SHARES)
def test_saved_and_loaded(share: str, tmp_path: Path) -> None:
    """A shared matrix is in the file once, and all layers use it afterwards, in a copy too."""
    model, ids = build(f"linformer:k=8,share={share}"), tokens(2, 30)
    model.save_pretrained(tmp_path)
    again, info = LongspanForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(again.eval()(ids).logits, wanted)
        twin = copy.deepcopy(model)
        for weight in projections(twin).values():
            weight.zero_()
        assert torch.equal(model(ids).logits, wanted)
        assert not torch.allclose(twin(ids).logits, wanted)
    if share == "layerwise":
        assert list(projections(again)) == ["model.layers.0.self_attn.projection.keys"]
        again(ids, labels=ids).loss.backward()
        own = projections(again)["model.layers.0.self_attn.projection.keys"]
        assert all(m.projection_in_use.keys is own for m in layers(again))


def test_sharing_is_among_layers_of_the_same_settings() -> None:
    model = build(["linformer:k=8,share=layerwise", "linformer:k=4,share=layerwise"], num_hidden_layers=4)
    assert [tuple(p.shape) for p in projections(model).values()] == [(1, 8, 32), (1, 4, 32)]
    model(tokens(1, 20))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(side: str) -> None:
    """Not its number, its side, nor what it says: padding is zero before it is projected."""
    model, ids, mask = build(), tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    inside = {"left": slice(6, 30), "right": slice(0, 24), "both": slice(4, 25)}[side]
    mask[0] = 0
    mask[0, inside] = 1
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[:1, inside], model(ids[:1, inside]).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1:], model(ids[1:]).logits, rtol=1e-4, atol=1e-5)
        other = torch.where(mask.bool(), ids, 7)
        assert torch.equal(model(other, attention_mask=mask).logits[:1, inside], got[:1, inside])


def test_refusals_say_what_works() -> None:
    for spec in ("linformer:k=8", "linformer:k=8,share=layerwise"):
        with pytest.raises(NotSupported, match=r"sum over the whole text.*kind=encoder"):
            LongspanForCausalLM(LongspanConfig(**{**build().config.to_dict(), "attention": spec, "kind": "decoder"}))
    with pytest.raises(NotSupported, match="sum over the whole text"):
        LongspanForConditionalGeneration(LongspanConfig(**{**build().config.to_dict(), "kind": "encoder-decoder"}))
    with pytest.raises(NotSupported, match="max_position_embeddings=33"):
        build()(tokens(1, 33))
    with pytest.raises(SpecError, match="k=8"):
        build("linformer:k=64")
    with pytest.raises(NotSupported, match="use position=sinusoidal or learned"):
        build(position="rope")
    with pytest.raises(SpecError, match="layerwise"):
        build("linformer:share=layers")


def test_trains_alike_with_checkpointing() -> None:
    model, ids = build("linformer:k=8,share=layerwise", attention_dropout=0.2).train(), tokens(2, 30)
    torch.manual_seed(1)
    model(ids, labels=ids).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g.any() for g in plain.values())
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


def test_error_falls_with_k() -> None:
    """Trained projections against full attention over texts whose neighbours are alike: less error with every doubling."""
    draw = torch.Generator().manual_seed(0)
    smooth = torch.randn(3, 64, 4, 64, generator=draw).cumsum(-1)[..., 31:].mT / 4  # (q k v, text, token, channel)
    q, k, v = smooth / smooth.std(2, keepdim=True)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for size in (2, 4, 8, 16):
        projection = Projection(Linformer(size), 1, q.shape[1])
        optimizer = torch.optim.Adam(projection.parameters(), lr=0.02)
        for _ in range(300):
            key, value = (x[:, 0] for x in projection(k[:, None], v[:, None]))
            error = (torch.nn.functional.scaled_dot_product_attention(q, key, value) - exact).norm() / exact.norm()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        errors.append(error.item())
    assert all(after < 0.9 * before for before, after in itertools.pairwise(errors)), errors
