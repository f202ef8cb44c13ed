"""What must hold for every pattern and mixer: its definition, no leak, padding, chunks, states, checkpoints, generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attentions import LINES, Line, build
from schemes import tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import checks
from longspan.core.method import catalogue, parse
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import reference_mix
from longspan.engine.patterns import attend
from longspan.lm import LongspanConfig, LongspanForMaskedLM
from longspan.lm.base import Attention, Mixer, Pattern
from longspan.util.errors import LongspanError, NotSupported, SpecError
from shared_model import assert_checkpoints_change_no_gradient, assert_threads_get_what_each_gets_alone
from ties import UndefinedAtTies

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
every = pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.spec}-{line.position}")
PATTERNS = [line for line in LINES if isinstance(parse(line.spec).methods[0], Pattern)]


def where(*conditions: str) -> pytest.MarkDecorator:
    chosen = [line for line in LINES if all(getattr(line, c) for c in conditions)]
    return pytest.mark.parametrize("line", chosen, ids=lambda line: f"{line.spec}-{line.position}")


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **given: object) -> Tensor:
    return model(ids, **given).logits


def test_every_attention_has_a_line() -> None:
    known = {n for n, cls in catalogue().items() if issubclass(cls, Attention)} - {"full"}
    assert known == {line.spec.partition(":")[0] for line in LINES}


@pytest.mark.parametrize("line", PATTERNS, ids=lambda line: f"{line.spec}-{line.position}")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_pattern_is_what_it_says(line: Line, causal: bool, padded: bool) -> None:
    """The fast way against softmax under the mask of `mask`, forward and backward, in float64."""
    if not (line.causal if causal else line.bidirectional):
        return
    pattern = parse(line.spec).methods[0]
    assert isinstance(pattern, Pattern)
    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, h, 50, 16, generator=draw).double().requires_grad_() for h in (4, 2, 2))
    padding = torch.ones(2, 50, dtype=torch.bool)
    if padded:
        padding[0, :7] = padding[1, 41:] = False
    first = padding.int().argmax(1, keepdim=True)
    number = torch.arange(50)[None] - first
    grid = AttentionShape(4, 50, 0, causal)
    mask = pattern.mask(number, number, grid) & padding[:, None, None]
    if causal:
        mask = mask & (number[:, None, None] <= number[:, None, :, None])
    real = padding[:, None, :, None]
    got = attend(pattern, AttentionCall(q, k, v, 0.3, padding if padded else None), grid) * real
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3
    counts = pattern.multiplicity(number, number, grid)
    if counts is not None:
        scores = scores + counts.clamp(min=1).double().log()
    wanted = reference_mix(scores, v.repeat_interleave(2, 1), mask) * real
    torch.testing.assert_close(got, wanted)
    pull = torch.randn(got.shape, generator=draw).double()
    ours = torch.autograd.grad((got * pull).sum(), (q, k, v))
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), (q, k, v)))


@where("causal", "exact")
def test_chunks_and_single_tokens_equal_one_forward(line: Line) -> None:
    model, ids = build(line), tokens(2, 40)
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for begin, end in ((0, 17), (17, 30), *((t, t + 1) for t in range(30, 40))):
            parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), **CLOSE)


@where("causal", "sealed")
def test_later_tokens_change_nothing_before_them(line: Line) -> None:
    model, ids = build(line), tokens(2, 40)
    for at in (39, 24, 16):
        other = ids.clone()
        other[:, at] = 2 + (other[:, at] - 1) % 90
        torch.testing.assert_close(logits(model, other)[:, :at], logits(model, ids)[:, :at], rtol=0, atol=line.leak)
        assert not torch.allclose(logits(model, other)[:, at], logits(model, ids)[:, at])


@where("causal", "exact")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(line: Line, side: str) -> None:
    checks.padding_changes_nothing(build(line), tokens(2, 30), side, **CLOSE)


@where("full", "causal")
def test_limit_is_full_attention(line: Line) -> None:
    ids = tokens(1, 40)
    wanted = logits(build(line, "full"), ids)
    torch.testing.assert_close(logits(build(line, line.full), ids), wanted, **CLOSE)
    assert not torch.allclose(logits(build(line), ids), wanted, atol=1e-2)


@where("causal")
def test_trains_with_and_without_checkpointing(line: Line) -> None:
    model, ids = build(line).train(), tokens(2, 32)
    torch.manual_seed(4)
    model(ids, labels=ids, use_cache=False).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.abs().sum() > 0 for g in plain.values()), [n for n, g in plain.items() if g.abs().sum() == 0]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(4)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], msg=name)


@where("causal")
@pytest.mark.parametrize("padded", [False, True])
def test_training_with_a_cache_is_training_without(line: Line, padded: bool) -> None:
    """A model's default is `use_cache=True`, in training too: loss and every gradient are the same."""
    model, ids = build(line).train(), tokens(2, 40)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    found = []
    for settings in ({"use_cache": False}, {}):
        model.zero_grad()
        out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **settings)
        out.loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert out.past_key_values is not None and out.past_key_values.get_seq_length() == 40
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@where("causal")
def test_saved_and_loaded(line: Line, tmp_path: Path) -> None:
    model, ids = build(line), tokens(1, 30)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval(), ids), logits(model, ids), rtol=0, atol=0)


@where("causal", "exact")
def test_generation_uses_the_cache(line: Line) -> None:
    """Greedy tokens of a left-padded batch equal those of each row by itself without a cache."""
    model, ids = build(line), tokens(2, 25)
    mask = checks.generation_uses_the_cache(model, ids)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3).shape[0] == 2


@every
def test_encoder(line: Line) -> None:
    """Both sides are seen, and padding is not; what only looks back refuses, and so does a decoder what looks ahead."""
    if not line.bidirectional:
        with pytest.raises(LongspanError, match=r"in an encoder|kind=decoder"):
            build(line, cls=LongspanForMaskedLM, kind="encoder")
        return
    if not line.causal:
        with pytest.raises(NotSupported, match="encoder"):
            build(line)
    model, ids = build(line, cls=LongspanForMaskedLM, kind="encoder"), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    got = logits(model, ids, attention_mask=mask)[:1, :20]
    if line.exact:
        torch.testing.assert_close(got, logits(model, ids[:1, :20]), **CLOSE)
    other = ids.clone()
    other[0, 20:] = 5
    torch.testing.assert_close(logits(model, other, attention_mask=mask)[:1, :20], got, **CLOSE)
    other[:, 6] = 2 + (other[:, 6] - 1) % 90
    assert (logits(model, ids)[:, 2] - logits(model, other)[:, 2]).abs().max() > 1e-4
    model(ids, labels=ids).loss.backward()


@where("causal", "exact")
def test_one_layer_of_several(line: Line) -> None:
    """A list of attentions is repeated over the layers, in any order, with one cache."""
    if line.seam != "attention":
        return
    for specs in ([line.spec, "full"], ["full", line.spec]):
        model, ids = build(line, attention=specs, num_hidden_layers=3), tokens(2, 30)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
            rest = [
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache) for t in range(20, 30)
            ]
        got = torch.cat([r.logits for r in rest], dim=1)
        torch.testing.assert_close(got, logits(model, ids, attention_mask=mask)[:, 20:], **CLOSE)


@where("causal")
def test_a_cache_keeps_no_key_that_nobody_sees_again(line: Line) -> None:
    """Of a long text, read whole and then token by token, and all the while what is dropped is seen by no later token."""
    pattern = parse(line.spec).methods[0]
    if not isinstance(pattern, Pattern) or pattern.cached() is None:
        return
    sinks, window = pattern.cached()
    number = torch.arange(150)
    seen = pattern.mask(number[None], number[None], AttentionShape(4, 150, 0, True))[0].any(0)
    dropped = (number >= sinks) & (number <= number[:, None] - window)
    assert not (seen & dropped).any()
    model, cache, ids = build(line), DynamicCache(), tokens(2, 150)
    with torch.no_grad():
        parts = [model(ids[:, :120], past_key_values=cache).logits]
        parts += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(120, 150)]
    assert [layer.keys.shape[2] for layer in cache.layers] == [sinks + window] * 2
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), **CLOSE)


def test_transformer_xl_keeps_its_memory_and_a_segment() -> None:
    line = Line("transformer-xl:segment=8,length=8", "xl", seam="memory")
    model, cache = build(line), DynamicCache()
    with torch.no_grad():
        model(tokens(1, 512), past_key_values=cache)
        for token in tokens(1, 20)[0]:
            model(token[None, None], past_key_values=cache)
    assert cache.get_seq_length() == 532
    assert {layer.keys.shape[2] for layer in cache.layers} == {16}


@every
def test_mixers_keep_a_state_of_one_size(line: Line) -> None:
    if not isinstance(parse(line.spec).methods[0], Mixer) or not line.causal or line.grows:
        return
    model, cache, sizes = build(line), DynamicCache(), []
    with torch.no_grad():
        for length in (40, 64):
            model(tokens(1, length), past_key_values=cache)
            sizes.append([sum(x.numel() for x in layer.tensors.values()) for layer in cache.layers])
    assert sizes[0] == sizes[1]


# In several hands: one line of each name, and one in which each forward of a training has other features.

ONE_EACH = [
    *{line.spec.partition(":")[0]: line for line in reversed(LINES)}.values(),
    Line("full"),
    Line("performer:features=16,redraw=1"),
]
one_each = pytest.mark.parametrize("line", ONE_EACH, ids=lambda line: line.spec)


def shared(line: Line) -> PreTrainedModel:
    return build(line) if line.causal else build(line, cls=LongspanForMaskedLM, kind="encoder")


def padded_text(number: int, length: int) -> dict[str, Tensor]:
    """Two rows of tokens, others for each number, and a mask that hides the beginning of the first."""
    ids = (tokens(2, length) + 7 * number) % 90 + 2
    mask = torch.ones_like(ids)
    mask[0, : 3 + 2 * number] = 0
    return {"input_ids": ids, "attention_mask": mask}


@one_each
def test_threads_share_a_model(line: Line) -> None:
    """Each reads a text of its own, whole, in pieces and a token at a time."""
    model = shared(line)

    @torch.no_grad()
    def answer(number: int) -> Tensor:
        text = padded_text(number, 24 + 5 * number)
        parts = [model(**text).logits[:, -4:]]
        cache = DynamicCache()
        for begin, end in ((0, 15), (15, 20), (20, 21), (21, 22)) if line.causal else ():
            ids, mask = text["input_ids"][:, begin:end], text["attention_mask"][:, :end]
            parts.append(model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:])
        return torch.cat(parts, dim=1)

    assert_threads_get_what_each_gets_alone(answer)


@one_each
def test_checkpoints_after_another_forward(line: Line) -> None:
    model, texts = shared(line).train(), [padded_text(n, 32) for n in (0, 1)]
    assert_checkpoints_change_no_gradient(
        model, *(lambda text=text: model(**text, labels=text["input_ids"], use_cache=False).loss for text in texts)
    )


def test_what_is_no_attention_is_refused() -> None:
    for spec in ("rope", "yarn:factor=4", "window:size=9 + yarn:factor=4", "windw"):
        with pytest.raises(SpecError):
            LongspanConfig(attention=spec)
    with pytest.raises(SpecError, match="window:size=256"):
        build(Line("window"))
    with pytest.raises(NotSupported, match="pairs"):
        build(Line("window:size=9"))(tokens(1, 8), attention_mask=torch.ones(1, 1, 8, 8))


@every
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_rest_on_no_subgradient_at_a_tie(line: Line, padded: bool) -> None:
    """torch 2.14 changed the gradient of `clamp` at its bound; where branches meet, a version may choose as it likes."""
    encoder = {} if line.causal else {"cls": LongspanForMaskedLM, "kind": "encoder"}
    model, ids = build(line, **encoder).train(), tokens(2, 40)  # type: ignore[arg-type]
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :7] = mask[1, 33:] = 0
    with UndefinedAtTies():
        model(
            ids, attention_mask=mask, **({"use_cache": False} if line.causal else {})
        ).logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)
