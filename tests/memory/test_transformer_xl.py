"""Transformer-XL against itself read one segment after the other, its scores against their formula, and how far it sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.lm.attention import query_scores, relative_scores
from longspan.positions.scheme import Shape
from longspan.positions.xl import XL, XLEncoding
from longspan.util.errors import NotSupported, SpecError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(memory: str, position: str = "xl", layers: int = 3, **more: Any) -> LongspanForCausalLM:
    torch.manual_seed(0)
    config = LongspanConfig(memory=memory, position=position, num_hidden_layers=layers, **{**SIZES, **more})
    model = LongspanForCausalLM(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.2 * weight.shape[-1] ** -0.5)
    return model


def one_after_the_other(model: LongspanForCausalLM, ids: Tensor, segment: int, length: int, same: bool) -> Tensor:
    """Final states (1, T, hidden) by the paper's recurrence: every layer keeps the last `length` states that came into it,
    cut off; scores, softmax and all else are written out."""
    config, place = model.config, model.model.place
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    width = config.head_dim
    memory = [torch.zeros(1, 0, config.hidden_size, dtype=torch.float64) for _ in model.model.layers]
    outs = []
    for chunk in ids.split(segment, dim=1):
        hidden = model.model.embed_tokens(chunk)
        for number, layer in enumerate(model.model.layers):
            own = layer.input_layernorm(hidden)
            context = torch.cat((memory[number], own), dim=1)
            memory[number] = context[:, max(0, context.shape[1] - length) :].detach() if length else memory[number]
            attention, held, new = layer.self_attn, context.shape[1], own.shape[1]
            q = attention.q_proj(own).view(new, heads, width)
            k = attention.k_proj(context).view(held, heads // groups, width).repeat_interleave(groups, 1)
            v = attention.v_proj(context).view(held, heads // groups, width).repeat_interleave(groups, 1)
            scores = torch.full((heads, new, held), float("-inf"), dtype=torch.float64)
            rows = []
            for i in range(new):
                far = torch.arange(held) - (held - new)
                far = i - far
                r = torch.cat([(far[:, None] * 10_000.0 ** (-torch.arange(0, 32, 2) / 32).double()).sin(),
                               (far[:, None] * 10_000.0 ** (-torch.arange(0, 32, 2) / 32).double()).cos()], -1)  # fmt: skip
                r = torch.einsum("nd,hwd->nhw", r, place.projection[number])
                score = ((q[i] + place.content) * k).sum(-1) + ((q[i] + place.position) * r).sum(-1)
                score = score / width**0.5
                score = score.masked_fill((far < 0)[:, None], float("-inf"))
                if same:
                    score = score.masked_fill((far >= length)[:, None], float("-inf"))
                rows.append(score.T)
            scores = torch.stack(rows, 1)
            mixed = torch.einsum("hqk,khw->qhw", scores.softmax(-1), v).reshape(1, new, -1)
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        outs.append(model.model.norm(hidden))
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize(("segment", "length", "same"), [(5, 7, False), (6, 4, False), (5, 9, True), (30, 0, False)])
def test_equals_one_segment_after_the_other(segment: int, length: int, same: bool) -> None:
    """Values and every gradient, in float64 but for what is kept in float32."""
    model = build(f"transformer-xl:segment={segment},length={length},same_length={str(same).lower()}")
    ids = torch.randint(60, (1, 23), generator=torch.Generator().manual_seed(1))
    pull = torch.randn(1, 23, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got = model.model(ids, use_cache=False).last_hidden_state
    (got * pull).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    wanted = one_after_the_other(model, ids, segment, length, same)
    (wanted * pull).sum().backward()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model.model(ids).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_the_segment_before() -> None:
    model = build("transformer-xl:segment=8,length=8")
    embeds = torch.randn(1, 24, 32, dtype=torch.float64, requires_grad=True)
    model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, 20].sum().backward()
    moved = embeds.grad[0].norm(dim=-1) > 0
    assert moved.tolist() == [False] * 16 + [True] * 5 + [False] * 3


@pytest.mark.parametrize("memory", ["segment=8,length=5", "segment=5,length=8,same_length=true"])
@pytest.mark.parametrize("position", ["xl", "rope", "alibi", "xpos"])
@pytest.mark.parametrize("padded", [False, True])
def test_going_on_with_gradients(memory: str, position: str, padded: bool) -> None:
    """Pieces of any size on a cache, gradients wanted: the states of one forward, and no gradient over a segment's end."""
    model, ids = build(f"transformer-xl:{memory}", position), torch.randint(60, (2, 40))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :6] = 0
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts = DynamicCache(), []
    for begin, end in ((0, 3), (3, 11), (11, 12), (12, 13), (13, 40)):
        embeds = model.model.embed_tokens(ids[:, begin:end]).detach().requires_grad_()
        out = model(inputs_embeds=embeds, attention_mask=mask[:, :end], past_key_values=cache)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask == 1], wanted[mask == 1], rtol=1e-5, atol=1e-5)
    (reached,) = torch.autograd.grad(out.logits[:, 30 - begin].sum(), embeds, retain_graph=True)
    segment = 8 if "segment=8" in memory else 5
    for row, first in ((0, 0), (1, 6 if padded else 0)):
        start = (30 - first) // segment * segment + first
        moved = (reached[row].norm(dim=-1) > 0).nonzero()[:, 0] + begin
        assert moved.tolist() == list(range(start, 31))
    k = model.model.layers[0].self_attn.k_proj.weight
    assert torch.autograd.grad(out.logits[:, -1].sum(), k)[0].isfinite().all()


@pytest.mark.parametrize(("length", "reach"), [(8, 31), (16, 39)])
@torch.no_grad()
def test_receptive_field(length: int, reach: int) -> None:
    """With a memory as long as the segment, three layers carry token 0 to token S(L + 1) - 1 = 31 and no further; a longer
    memory carries it further: the segments within 16 tokens of the one before, three times."""
    model = build(f"transformer-xl:segment=8,length={length}")
    ids = torch.randint(60, (1, 72), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 60
    change = (model(ids).logits - model(other).logits)[0].abs().amax(-1)
    last = int(change.nonzero().max())
    assert last == (reach if length == 8 else 7 + 3 * 16)


def test_scores_are_the_formula() -> None:
    """(q + v) · W_R R_(i-j) for every pair, whichever way the positions run."""
    torch.manual_seed(0)
    place = XL().build(Shape(layers=2, hidden=16, heads=2, head_dim=4, window=8, causal=True))
    assert isinstance(place, XLEncoding)
    torch.nn.init.normal_(place.projection)
    q = torch.randn(2, 2, 3, 4)
    for queries, keys in (
        (torch.tensor([[4, 5, 6]]), torch.arange(7)[None]),
        (torch.tensor([[4, 5, 6], [1, 2, 3]]), torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 2, 3]])),
    ):
        asking = query_scores(place, q, queries, 1)
        assert asking is not None
        got = relative_scores(asking, slice(0, 3), queries, keys)
        for b, h, i, j in ((0, 0, 0, 0), (1, 1, 2, 6), (1, 0, 0, 3), (0, 1, 1, 6)):
            far = float(queries[b % len(queries), i] - keys[b % len(keys), j])
            angles = far * 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
            r = place.projection[1, h] @ torch.cat((angles.sin(), angles.cos()))
            torch.testing.assert_close(got[b, h, i, j], (q[b, h, i] + place.position[h]) @ r)


def test_segments_longer_than_a_float_can_hold_under_xpos() -> None:
    """The fastest pair fades by e^-12 a token here: over a segment of 30 its scales leave float32's range."""
    model = build("transformer-xl:segment=30,length=20", "xpos:scale_base=0.1").float()
    ids = torch.randint(60, (2, 70), generator=torch.Generator().manual_seed(1))
    got = model(ids, use_cache=False).logits
    with torch.no_grad():
        parts = [model(ids[:, :1], use_cache=True)]
        for t in range(1, 70):
            parts.append(model(ids[:, t : t + 1], past_key_values=parts[-1].past_key_values))
    torch.testing.assert_close(got, torch.cat([p.logits for p in parts], dim=1), rtol=1e-4, atol=1e-4)
    got.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_read_with_a_longer_memory(tmp_path: Any) -> None:
    model, ids = build("transformer-xl:segment=8,length=8").float().eval(), torch.arange(40)[None] % 60
    model.save_pretrained(tmp_path)
    longer = AutoModelForCausalLM.from_pretrained(
        tmp_path, memory="transformer-xl:segment=4,length=40,same_length=true"
    )
    full = AutoModelForCausalLM.from_pretrained(tmp_path, memory="none")
    with torch.no_grad():
        torch.testing.assert_close(longer(ids).logits, full(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(longer(ids).logits, model(ids).logits, atol=1e-2)


def test_what_cannot_be_is_refused() -> None:
    for position in ("sinusoidal", "learned"):
        with pytest.raises(NotSupported, match="position=xl"):
            build("transformer-xl", position)
    with pytest.raises(NotSupported, match="every pair"):
        build("transformer-xl", "tupe")
    with pytest.raises(NotSupported, match="leave one of them out"):
        build("transformer-xl", "rope", attention="window:size=8")
    with pytest.raises(SpecError, match="is not a memory"):
        build("window:size=8")
    with pytest.raises(SpecError, match="at least 1 token"):
        build("transformer-xl:segment=0")
    with pytest.raises(SpecError, match="attention"):
        build("none", attention="transformer-xl")
