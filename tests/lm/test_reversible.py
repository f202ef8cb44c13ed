"""Reversible layers against the same two streams with everything kept, what they keep, and what they refuse."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attentions import LINES, Line
from schemes import SIZES, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from longspan.attention.lsh import LshAttention
from longspan.engine.recorded_choices import decided, keeping, repeating
from longspan.lm import LongspanConfig, LongspanForCausalLM, LongspanForConditionalGeneration, LongspanForMaskedLM
from longspan.lm.modeling import LongspanModel
from longspan.lm.reversible import reversible
from longspan.util.errors import NotSupported
from shared_model import gradients as both_at_once

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
MODELS = [
    ("full", "rope", "decoder"),
    ("full", "kerple", "decoder"),
    ("full", "tupe", "decoder"),
    ("window:size=9", "t5", "decoder"),
    ("lsh:chunk=8,form=paper", "rope", "decoder"),
    ("lsh:chunk=8,form=trax", "sinusoidal", "decoder"),
    ("lsh:chunk=8", "learned", "decoder"),
    (["window:size=9", "full", "lsh:chunk=8"], "rope", "decoder"),
    ("lsh:chunk=8", "rope", "encoder"),
    ("full", "alibi", "encoder"),
    ("full", "kerple", "encoder-decoder"),
    ("lsh:chunk=8", "rope", "encoder-decoder"),
]
CLASSES: dict[str, type[PreTrainedModel]] = {
    "decoder": LongspanForCausalLM,
    "encoder": LongspanForMaskedLM,
    "encoder-decoder": LongspanForConditionalGeneration,
}


def build(attention: str | list[str] = "full", position: str = "rope", kind: str = "decoder", **more: Any) -> Any:
    torch.manual_seed(1)
    settings = {**SIZES, "num_hidden_layers": 3, "reversible": True, **more}
    model = CLASSES[kind](LongspanConfig(attention=attention, position=position, kind=kind, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.spec}-{line.position}")
def test_every_attention_runs_alike_both_times(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "decoder" if line.causal else "encoder"
    model = build(position=line.position, kind=kind, **{line.seam: line.spec}, **line.settings, hidden_dropout=0.2)
    ids = tokens(2, 32)
    state = copy.deepcopy(model.state_dict())  # what is drawn anew in training is drawn from here both times
    logits, gradients = step(model, ids)
    model.load_state_dict(state)
    with everything_kept(monkeypatch):
        wanted, kept = step(model, ids)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
    torch.testing.assert_close(gradients, kept, rtol=1e-4, atol=1e-5)


def test_layers_that_run_again_after_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward of a training has other features here."""
    model, texts = build("performer:features=16,redraw=1").train(), [tokens(2, 32), tokens(2, 32).flip(1)]
    losses = [lambda ids=ids: model(ids, labels=ids, use_cache=False).loss for ids in texts]
    state = copy.deepcopy(model.state_dict())
    got = both_at_once(model, losses)
    model.load_state_dict(state)
    with everything_kept(monkeypatch):
        torch.testing.assert_close(got, both_at_once(model, losses), rtol=1e-4, atol=1e-5)


@contextmanager
def everything_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The two streams as plain operations, which torch differentiates by itself."""
    with monkeypatch.context() as patch:
        patch.setattr(LongspanModel, "_going_back", False)
        yield


def step(model: Any, ids: Tensor, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.train().zero_grad()
    torch.manual_seed(4)
    out = model(ids, labels=ids, use_cache=False, **given)
    out.loss.backward()
    return out.logits, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("attention", "position", "kind"), MODELS)
def test_equals_the_streams_with_everything_kept(
    attention: str | list[str], position: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and all gradients, with dropout and padding."""
    model, ids = build(attention, position, kind, **DROPOUT), tokens(2, 32)
    mask = torch.ones_like(ids)
    mask[0, 25:] = 0
    logits, gradients = step(model, ids, attention_mask=mask)
    after = torch.rand(3)
    with everything_kept(monkeypatch):
        wanted, kept = step(model, ids, attention_mask=mask)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
    assert torch.equal(after, torch.rand(3))  # the second runs have left the random numbers alone
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, kept[name], rtol=1e-4, atol=1e-5, msg=name)
    assert all(g.abs().sum() > 0 for g in gradients.values())


def test_is_equation_9() -> None:
    """Y1 = X1 + Attention(X2), Y2 = X2 + FeedForward(Y1), the embeddings in both and the mean at the end."""
    model, ids = build().train(), tokens(2, 20)
    inner = model.model
    x1 = x2 = inner.embed_tokens(ids)
    rotation = inner.rotary_emb(x1, torch.arange(20)[None])
    for layer in inner.layers:
        x1 = x1 + layer.self_attn(layer.input_layernorm(x2), None, rotation, position_ids=torch.arange(20)[None])[0]
        x2 = x2 + layer.mlp(layer.post_attention_layernorm(x1))
    wanted = model.lm_head(inner.norm((x1 + x2) / 2))
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in build(reversible=False).named_parameters()
    }


class Kept:
    """A tensor that a graph holds for as long as it holds this."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def kept_bytes(attention: str, layers: int, **more: Any) -> int:
    """What is kept for the backward when the forward is done, without the weights."""
    model, ids = build(attention, num_hidden_layers=layers, **more).train(), tokens(1, 64)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(saved: Tensor) -> Kept:
        kept = Kept(saved.detach())  # an output with its history would keep itself
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    storages = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage().nbytes() for k in alive}
    assert loss.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def test_memory_is_level_in_depth() -> None:
    two, eight = kept_bytes("full", 2), kept_bytes("full", 8)
    assert two == eight
    buckets = 4 * 2 * 64 * 2  # heads, rounds, tokens, bytes: all that a layer of hashes adds
    assert kept_bytes("lsh:chunk=8", 8) - kept_bytes("lsh:chunk=8", 2) == 6 * buckets
    assert kept_bytes("full", 8, reversible=False) - kept_bytes("full", 2, reversible=False) > 4 * eight


def test_buckets_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, found = [], LshAttention.buckets_of
    monkeypatch.setattr(LshAttention, "buckets_of", lambda self, qk: calls.append(1) or found(self, qk))
    step(build("lsh:chunk=8"), tokens(2, 32))
    assert len(calls) == 3


def test_decisions_hold_though_the_way_back_rounds() -> None:
    """Branches whose gradient hangs on the last bit of what they read."""
    x = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))

    def branch(stream: Tensor, **inputs: Any) -> Tensor:
        odd = decided(lambda: (stream.detach().view(torch.int32) % 2).bool())
        return torch.where(odd, 0.5 * stream, -0.3 * stream)

    def run(*, back: bool) -> Tensor:
        given = x.clone().requires_grad_()
        if back:
            a, b = reversible([branch] * 6, given, [], {})
        else:
            a = b = given
            for _ in range(6):
                a, b = b, a + branch(b)
        (gradient,) = torch.autograd.grad((a + b).square().sum(), given)
        return gradient

    torch.testing.assert_close(run(back=True), run(back=False), rtol=1e-4, atol=1e-4)
    with keeping() as kept:
        branch(x)
    with repeating(kept):
        changed = branch(x + 1e-6)
    torch.testing.assert_close(changed, branch(x), rtol=1e-4, atol=1e-4)


def test_mixed_precision_runs_alike_both_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("lsh:chunk=8", **DROPOUT), tokens(2, 32)
    for inside in (False, True):  # the backward outside of autocast, as it should be, or within

        def mixed(inside: bool = inside) -> tuple[Tensor, dict[str, Tensor]]:
            model.train().zero_grad()
            torch.manual_seed(4)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(ids, labels=ids, use_cache=False).loss
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            return loss, {name: p.grad.clone() for name, p in model.named_parameters()}

        loss, gradients = mixed()
        with everything_kept(monkeypatch):
            wanted, kept = mixed()
        assert torch.equal(loss, wanted)
        for name, gradient in gradients.items():
            assert (gradient - kept[name]).norm() < 0.05 * kept[name].norm(), name


def test_gradients_of_inputs_and_of_a_few_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """With most parameters frozen, by torch.autograd.grad, and to embeddings given in place of tokens."""
    model = build("full", "kerple").train().requires_grad_(False)
    chosen = model.model.layers[1].mlp.up_proj.weight.requires_grad_()
    embeds = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(inputs_embeds=embeds).logits.square().mean(), (chosen, embeds))

    got = run()
    with everything_kept(monkeypatch):
        torch.testing.assert_close(got, run(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["full", "window:size=9", "lsh:chunk=4"])
def test_cache_in_evaluation(attention: str) -> None:
    model, ids = build(attention).eval(), tokens(2, 40)
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for begin, end in ((0, 17), (17, 30), *((t, t + 1) for t in range(30, 40))):
            parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-4, atol=1e-4)
        states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == 4
    made = model.generate(ids, max_new_tokens=5, do_sample=False, num_beams=2)
    assert made.shape == (2, 45)


def test_what_does_not_go_together_is_refused() -> None:
    model, ids = build().train(), tokens(1, 16)
    for enable in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        if hasattr(model, enable):
            with pytest.raises(NotSupported, match="reversible"):
                getattr(model, enable)()
    with pytest.raises(NotSupported, match="cache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(NotSupported, match="output_hidden_states"):
        model(ids, output_hidden_states=True)
    assert model(ids).past_key_values is None


@pytest.mark.cuda
@pytest.mark.parametrize("attention", ["full", "window:size=9", "lsh:chunk=8,form=paper", "lsh:chunk=8"])
@pytest.mark.parametrize("mixed", [False, True])
def test_on_a_gpu_with_its_random_numbers(attention: str, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(attention, **DROPOUT).cuda(), tokens(2, 64).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mixed):
        logits, gradients = step(model, ids)
        after = torch.rand(3, device="cuda")
        with everything_kept(monkeypatch):
            wanted, kept = step(model, ids)
    assert torch.equal(after, torch.rand(3, device="cuda"))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        assert (gradient - kept[name]).norm() < (0.05 if mixed else 1e-3) * kept[name].norm(), name
