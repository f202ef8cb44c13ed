"""Models with a zero sink or a learned one: the formulas in float64, caches, padding, generation, checkpoints, streaming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attentions import Line, build
from schemes import SIZES, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

import checks
import longspan as ls
from longspan.core.method import parse
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import attention, expand_heads, with_zero_key
from longspan.engine.patterns import attend
from longspan.lm import LongspanConfig, LongspanForCausalLM, LongspanForMaskedLM, LongspanForSequenceClassification
from longspan.lm.base import Pattern
from longspan.lm.layers import rotated
from longspan.reading.stream_decoder import StreamDecoder
from longspan.util.errors import NotSupported, SpecError

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LONGNET = "longnet:segments=8/16,dilations=1/2"
SPECS = (
    "full",
    "window:size=9",
    "window:size=7,sinks=3",
    "local:block=8",
    "overlap:block=6",
    "longformer:window=8",
    LONGNET,
)
MODELS = [
    Line("full", settings={"sink": "zero"}),
    Line("full", "alibi", settings={"sink": "zero"}),
    Line("full", "xl", settings={"sink": "zero"}),
    Line("window:size=9", settings={"sink": "zero"}),
    Line("window:size=7,sinks=2", "kerple", settings={"sink": "zero"}),
    Line("local:block=8", settings={"sink": "zero"}),
    Line("longnet:segments=8/16/24,dilations=1/2/3", settings={"sink": "zero"}),
    Line("full", settings={"sink": "learned"}),
    Line("full", "learned", settings={"sink": "learned"}),
    Line("full", "alibi", settings={"sink": "learned"}),
    Line("window:size=7,sinks=1", settings={"sink": "learned"}),
    Line("local:block=8", "xl", settings={"sink": "learned"}),
    Line("linear", settings={"sink": "learned"}),
    Line("transformer-xl:segment=7,length=9", "xl", seam="memory", settings={"sink": "learned"}),
]
every = pytest.mark.parametrize("line", MODELS, ids=lambda line: f"{line.settings['sink']}-{line.spec}-{line.position}")


def model_of(line: Line, **more: Any) -> Any:
    model = build(line, **more)
    if hasattr(model.model, "sink"):
        nn.init.normal_(model.model.sink.weight, generator=torch.Generator().manual_seed(9))
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    return model(ids, **given).logits


def off_by_one(scores: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """exp(x) / (1 + sum of exp(x)) by its formula; scores and mask (B, H, Tq, Tk)."""
    weights = scores.exp() * mask
    return weights / (1 + weights.sum(-1, keepdim=True)) @ value


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_softmax_off_by_one_of_every_pattern(spec: str, biased: bool, padded: bool) -> None:
    """In float64, forward and backward, with grouped heads; LongNet's keys count as often as they do."""
    pattern = parse(spec).methods[0]
    assert isinstance(pattern, Pattern)
    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, h, 50, 16, generator=draw).double().requires_grad_() for h in (4, 2, 2))
    padding = torch.ones(2, 50, dtype=torch.bool)
    if padded:
        padding[0, :7] = padding[1, 41:] = False
    number = torch.arange(50)[None] - padding.int().argmax(1, keepdim=True)
    grid = AttentionShape(4, 50, 0, True)

    def bias(far: Tensor) -> Tensor:
        return -0.1 * torch.arange(1, 5).view(4, *[1] * far.ndim) * far.abs()

    call = AttentionCall(q, k, v, 0.3, padding if padded else None, bias if biased else None, zero_key=True)
    got = attend(pattern, call, grid) * padding[:, None, :, None]
    mask = pattern.mask(number, number, grid) & padding[:, None, None]
    mask = mask & (number[:, None, None] <= number[:, None, :, None])
    scores = q @ expand_heads(k, 4).mT * 0.3
    if biased:
        scores = scores + bias(number[:, :, None] - number[:, None]).transpose(0, 1)
    if (counts := pattern.multiplicity(number, number, grid)) is not None:
        scores = scores + counts.clamp(min=1).double().log()
    wanted = off_by_one(scores, expand_heads(v, 4), mask) * padding[:, None, :, None]
    torch.testing.assert_close(got, wanted)
    pull = torch.randn(got.shape, generator=draw).double()
    ours = torch.autograd.grad((got * pull).sum(), (q, k, v))
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), (q, k, v)))


@pytest.mark.cuda
@pytest.mark.parametrize("spec", ["full", "window:size=100", "local:block=64", LONGNET])
def test_softmax_off_by_one_on_a_gpu(spec: str) -> None:
    """In bfloat16, forward and backward, whatever way it goes there."""
    model = model_of(Line(spec, settings={"sink": "zero"}), head_dim=64, max_position_embeddings=512).cuda()
    ids = tokens(2, 300).cuda()
    found = []
    for kind in (torch.float32, torch.bfloat16):
        made = copy.deepcopy(model).to(kind)
        made(ids, labels=ids, use_cache=False).loss.backward()
        found.append((logits(made, ids).float(), made.model.layers[0].self_attn.k_proj.weight.grad.float()))
    for exact, half in zip(*found, strict=True):
        assert (exact - half).norm() < 0.1 * exact.norm()


def test_zero_key_of_a_mask() -> None:
    q, k, v = (torch.randn(1, h, 5, 8, dtype=torch.double) for h in (4, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    got = attention(q, *with_zero_key(k, v, mask), 0.5)
    torch.testing.assert_close(got, off_by_one(q @ expand_heads(k, 4).mT * 0.5, expand_heads(v, 4), mask))


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_zero_sink_in_a_model(position: str) -> None:
    """Every layer against the formula, by its own projections in float64; and without the sink it is another."""
    model = model_of(Line("full", position, settings={"sink": "zero"}), num_hidden_layers=1).double()
    ids, seen = tokens(2, 20), {}
    layer = model.model.layers[0].self_attn
    layer.o_proj.register_forward_hook(lambda m, given, out: seen.update(given=given[0]))
    layer.q_proj.register_forward_hook(lambda m, given, out: seen.update(states=given[0]))
    model(ids)
    q, k, v = (layer._heads(p(seen["states"])) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if position == "rope":
        tables = model.model.rotary_emb(q, torch.arange(20)[None])
        q, k = rotated(q, tables), rotated(k, tables)
    scores = q @ expand_heads(k, 4).mT * layer.scaling
    if position == "alibi":
        far = torch.arange(20)[:, None] - torch.arange(20)
        scores = scores + model.model.place.bias(far)[None]
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    wanted = off_by_one(scores, expand_heads(v, 4), mask).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["given"], wanted, rtol=1e-5, atol=1e-6)


def test_learned_sink_is_a_token_before_the_text() -> None:
    """The same as a model without one whose text begins with a token of that embedding, its loss and gradients too."""
    line = Line("full", settings={"sink": "learned"})
    model, ids = model_of(line).double(), tokens(2, 20).clamp(max=98)
    settings = {**SIZES, "position": "rope"}
    plain = LongspanForCausalLM(LongspanConfig(**settings)).double().eval()
    weights = {n: w for n, w in model.state_dict().items() if "sink" not in n}
    plain.load_state_dict(weights)
    with torch.no_grad():
        plain.model.embed_tokens.weight[99] = model.model.sink.weight
    before = torch.cat((torch.full((2, 1), 99), ids), dim=1)
    given, wanted = model(ids, labels=ids), plain(before, labels=before.masked_fill(before == 99, -100))
    torch.testing.assert_close(given.logits[..., :99], wanted.logits[:, 1:, :99])
    states = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], plain(before, output_hidden_states=True).hidden_states[1][:, 1:])
    pull = torch.randn(2, 20, 99).double()
    pull[:, 0] = 0
    (given.logits[..., :99] * pull).sum().backward()
    (wanted.logits[:, 1:, :99] * pull).sum().backward()
    tied = plain.model.embed_tokens.weight.grad[99]
    torch.testing.assert_close(model.model.sink.weight.grad, tied)
    grads = (model.model.layers[0].self_attn.k_proj.weight.grad, plain.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*grads)


@every
def test_chunks_and_single_tokens_equal_one_forward(line: Line) -> None:
    model, ids = model_of(line), tokens(2, 40)
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for begin, end in ((0, 17), (17, 30), *((t, t + 1) for t in range(30, 40))):
            parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
    assert cache.get_seq_length() == 40 + model.model.leading
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), **CLOSE)
    other = model_of(Line(line.spec, line.position, seam=line.seam))
    assert not torch.allclose(logits(other, ids), logits(model, ids), atol=1e-2)


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(line: Line, side: str) -> None:
    model, ids = model_of(line), tokens(2, 30)
    got, mask = checks.padding_changes_nothing(model, ids, side, **CLOSE)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(
        logits(model, ids, attention_mask=mask, position_ids=positions)[mask.bool()], got[mask.bool()]
    )


@every
def test_generation_and_several_turns(line: Line) -> None:
    model, ids = model_of(line), tokens(2, 25)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    made = model.generate(ids, attention_mask=mask, max_new_tokens=8, **settings)
    for row, begin in ((0, 6), (1, 0)):
        own = ids[row : row + 1, begin:]
        for _ in range(8):
            own = torch.cat((own, logits(model, own)[:, -1:].argmax(-1)), dim=1)
        assert made[row, begin:].tolist() == own[0].tolist()
    turn = torch.cat((made, tokens(2, 5)), dim=1)
    whole = torch.cat((mask, torch.ones(2, 13, dtype=mask.dtype)), dim=1)
    cache = DynamicCache()
    with torch.no_grad():
        model(made[:, :-1], attention_mask=whole[:, :32], past_key_values=cache)
    second = model.generate(turn, attention_mask=whole, max_new_tokens=6, past_key_values=cache, **settings)
    assert second.tolist() == model.generate(turn, attention_mask=whole, max_new_tokens=6, **settings).tolist()
    assert model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=3).shape[0] == 2


@every
def test_trained_saved_copied_and_loaded(line: Line, tmp_path: Path) -> None:
    model, ids = model_of(line), tokens(2, 30)
    checks.trains_alike_with_checkpointing(model, ids)
    model.eval().save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.sink == line.settings["sink"]
    torch.testing.assert_close(logits(again.eval(), ids), logits(model, ids), rtol=0, atol=0)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    torch.testing.assert_close(logits(copied, ids), logits(again, ids), rtol=0, atol=0)


@pytest.mark.parametrize("sink", ["none", "zero", "learned"])
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_streaming_on_such_models(sink: str, sinks: int) -> None:
    """Short texts are unchanged; however a text is cut, also padded and by the fixed step, the result is one; one layer equals
    attention over the kept tokens by hand."""
    model, ids = model_of(Line("full", settings={"sink": sink})), tokens(2, 60)
    before = logits(model, ids[:, :10])
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with ls.applied(model, f"streaming:sinks={sinks},window=12"):
        torch.testing.assert_close(logits(model, ids[:, :10]), before, **CLOSE)
        whole = logits(model, ids)
        cache, parts = DynamicCache(), []
        with torch.no_grad():
            for begin, end in ((0, 9), (9, 30), *((t, t + 1) for t in range(30, 45))):
                parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, :45], **CLOSE)
        decoder = StreamDecoder(model, cache)
        steps = [decoder.step(ids[:, t : t + 1]).clone() for t in range(45, 60)]
        torch.testing.assert_close(torch.stack(steps, dim=1), whole[:, 45:], **CLOSE)
        padded = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(padded[:1, 6:], logits(model, ids[:1, 6:]), **CLOSE)
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 10}
        plainly = model.generate(ids, attention_mask=mask, **settings)
        assert (
            plainly.tolist()
            == model.generate(ids, attention_mask=mask, custom_generate=ls.stream_generate, **settings).tolist()
        )
    torch.testing.assert_close(logits(model, ids[:, :10]), before, rtol=0, atol=0)


def test_streaming_keeps_the_learned_token_alone() -> None:
    """With sinks=1 the kept token is the model's own, as the paper's 1 + 1023: what the text begins with has no part."""
    ids = tokens(1, 60)
    other = ids.clone()
    other[:, :4] = 2 + other[:, :4] % 50
    for sink, same in (("learned", True), ("none", False)):
        model = model_of(Line("full", settings={"sink": sink}), num_hidden_layers=1)
        with ls.applied(model, "streaming:sinks=1,window=8"):
            a, b = logits(model, ids)[:, -1], logits(model, other)[:, -1]
        assert torch.allclose(a, b, atol=1e-6) is same


@pytest.mark.parametrize("sink", ["none", "zero", "learned"])
@pytest.mark.parametrize("spec", ["full", "local:block=8", "window:size=9"])
def test_mixed_precision(sink: str, spec: str) -> None:
    """Under autocast, where rotary tables are float32 and projections are not, as in training; whole layers once more too."""
    model, ids = model_of(Line(spec, settings={"sink": sink})).train(), tokens(2, 32)
    wanted = model(ids, labels=ids, use_cache=False).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(ids, labels=ids, use_cache=False).loss
        got.backward()
    assert abs(got.item() - wanted.item()) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("spec", ["full", "local:block=8"])
def test_compiled_training(spec: str) -> None:
    model, ids = model_of(Line(spec, settings={"sink": "zero"})).train(), tokens(2, 32)
    wanted = model(ids, labels=ids, use_cache=False).loss
    wanted.backward()
    grad = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model.base_model.compile(dynamic=False, backend="aot_eager")
    got = model(ids, labels=ids, use_cache=False).loss
    got.backward()
    torch.testing.assert_close(got, wanted, **CLOSE)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, grad, **CLOSE)


def test_reversible_layers_with_sinks() -> None:
    for sink in ("zero", "learned"):
        model, ids = model_of(Line("full", settings={"sink": sink}), reversible=True).train(), tokens(2, 32)
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_other_methods_on_such_models() -> None:
    """What leaves the model its attention works; what brings a softmax of its own is refused with a zero sink."""
    ids = tokens(1, 40)
    zero = model_of(Line("full", settings={"sink": "zero"}))
    with ls.applied(zero, "window:size=16"):
        assert logits(zero, ids).isfinite().all()
    for spec in ("self-extend:group=2,window=16", "performer:features=16"):
        with pytest.raises(NotSupported):
            ls.apply(zero, spec)
    learned = model_of(Line("full", settings={"sink": "learned"}))
    with ls.applied(learned, "self-extend:group=2,window=16"):
        made = learned.generate(ids, max_new_tokens=5, do_sample=False)
        own = ids
        for _ in range(5):
            own = torch.cat((own, logits(learned, own)[:, -1:].argmax(-1)), dim=1)
        assert made.tolist() == own.tolist() or 1 in made[0, 40:]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match="sink must be one of"):
        LongspanConfig(**SIZES, sink="logit")
    for kind, cls in (("encoder", LongspanForMaskedLM),):
        with pytest.raises(NotSupported, match="kind=decoder"):
            cls(LongspanConfig(**SIZES, kind=kind, sink="learned"))
    for more in (
        {"attention": "linear"},
        {"attention": ["full", "s4"], "position": "nope"},
        {"memory": "transformer-xl"},
    ):
        with pytest.raises(NotSupported, match="sink=learned"):
            LongspanForCausalLM(LongspanConfig(**SIZES, sink="zero", **more))
    zero = LongspanForCausalLM(LongspanConfig(**SIZES, sink="zero"))
    zero.set_attn_implementation("sdpa")
    with pytest.raises(NotSupported, match="sink=zero"):
        zero(tokens(1, 5))
    learned = LongspanForCausalLM(LongspanConfig(**SIZES, sink="learned"))
    ids = tokens(2, 8)
    with pytest.raises(NotSupported, match="packed"):
        learned(ids, position_ids=torch.arange(4).repeat(2)[None])
    with pytest.raises(NotSupported, match="mask of the padding"):
        learned(ids, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(NotSupported, match="only padding in the first call"):
        learned(ids, attention_mask=torch.tensor([[0] * 8, [1] * 8]))
    with pytest.raises(NotSupported, match="StaticCache"):
        learned.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_a_classifier_with_a_learned_sink() -> None:
    model = LongspanForSequenceClassification(LongspanConfig(**SIZES, sink="learned", num_labels=3)).eval()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[:1], model(ids[:1, :8]).logits, **CLOSE)
