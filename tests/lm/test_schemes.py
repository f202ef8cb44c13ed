"""What must hold for every position scheme: cache, padding, chunks, shifts, limits, checkpoints, encoders, generation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from schemes import LINES, WINDOW, Line, build, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import checks
from longspan.apply import applied, apply
from longspan.core.method import NoMethod, catalogue
from longspan.lm import LongspanForConditionalGeneration, LongspanForMaskedLM, LongspanForSequenceClassification
from longspan.lm import attention as lm_attention
from longspan.positions.scheme import Scheme
from longspan.util.errors import NotSupported
from ties import UndefinedAtTies

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
every = pytest.mark.parametrize("line", LINES, ids=lambda line: line.spec)


def where(*conditions: str) -> pytest.MarkDecorator:
    chosen = [line for line in LINES if all(getattr(line, c) for c in conditions)]
    return pytest.mark.parametrize("line", chosen, ids=lambda line: line.spec)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **given: object) -> Tensor:
    return model(ids, **given).logits


def test_every_scheme_has_a_line() -> None:
    schemes = {n for n, cls in catalogue().items() if issubclass(cls, Scheme) and NoMethod.works_on not in cls.works_on}
    assert schemes == {line.spec.split(" + ")[0].partition(":")[0] for line in LINES}


@every
def test_chunks_and_single_tokens_equal_one_forward(line: Line) -> None:
    model, ids = build(line.spec), tokens(2, 40)
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for begin, end in ((0, 17), (17, 30), *((t, t + 1) for t in range(30, 40))):
            parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), **CLOSE)


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(line: Line, side: str) -> None:
    model, ids = build(line.spec), tokens(2, 30)
    mask = torch.ones_like(ids)
    inside = slice(7, None) if side == "left" else slice(None, 23)
    short = ids[:1, inside]
    mask[0] = 0
    mask[0, inside] = 1
    got = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(got[:1, inside], logits(model, short), **CLOSE)
    torch.testing.assert_close(got[1:], logits(model, ids[1:]), **CLOSE)


@every
def test_shifted_positions(line: Line) -> None:
    """What only looks at distances does not see a shift of all positions; what looks at places does."""
    model, ids = build(line.spec), tokens(1, 20)
    plain = logits(model, ids)
    shifted = logits(model, ids, position_ids=torch.arange(20)[None] + 30)
    assert torch.allclose(plain, shifted, rtol=1e-3, atol=1e-3) == line.relative


@where("limit")
def test_limit_is_the_baseline(line: Line) -> None:
    ids = tokens(1, 40)
    limited = build(line.limit)
    with torch.no_grad():
        for name, weight in limited.named_parameters():
            if "place" in name:
                weight.fill_(0.7)  # one number for all distances is none
    torch.testing.assert_close(logits(limited, ids), logits(build(line.baseline), ids), **CLOSE)
    assert not torch.allclose(logits(build(line.spec), ids), logits(build(line.baseline), ids), atol=1e-2)


@every
def test_trains_with_and_without_checkpointing(line: Line) -> None:
    checks.trains_alike_with_checkpointing(build(line.spec), tokens(2, 32))


@every
def test_saved_and_loaded(line: Line, tmp_path: Path) -> None:
    model, ids = build(line.spec), tokens(1, 30)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval(), ids), logits(model, ids), rtol=0, atol=0)


@every
def test_generation_uses_the_cache(line: Line) -> None:
    """Greedy tokens of a left-padded batch equal those of each row by itself without a cache."""
    checks.generation_uses_the_cache(build(line.spec), tokens(2, 25))


@every
def test_length_past_the_window(line: Line) -> None:
    model, ids = build(line.spec), tokens(1, 3 * WINDOW)
    if line.endless:
        assert logits(model, ids).isfinite().all()
    else:
        with pytest.raises(NotSupported, match="positions"):
            logits(model, ids)


@every
def test_encoder(line: Line) -> None:
    """Both sides are seen, and padding is not; schemes that only look back refuse."""
    if not line.encoder:
        with pytest.raises(Exception, match="encoder"):
            build(line.spec, LongspanForMaskedLM, kind="encoder")
        return
    model, ids = build(line.spec, LongspanForMaskedLM, kind="encoder"), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    torch.testing.assert_close(logits(model, ids, attention_mask=mask)[:1, :20], logits(model, ids[:1, :20]), **CLOSE)
    other = ids.clone()
    other[:, -1] = 2 + (other[:, -1] - 1) % 90
    assert (logits(model, ids)[:, 0] - logits(model, other)[:, 0]).abs().max() > 1e-4
    model(ids, labels=ids).loss.backward()


@where("encoder")
def test_encoder_decoder_generates_what_it_computes(line: Line) -> None:
    model = build(line.spec, LongspanForConditionalGeneration, kind="encoder-decoder", decoder_layers=3)
    ids = tokens(2, 25)
    mask = checks.encoder_decoder_generates_what_it_computes(model, ids, padded=7, new=7)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=3).shape[0] == 2
    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert loss.isfinite()


def answers(model: PreTrainedModel, ids: Tensor, bf16: bool = False) -> dict[str, Tensor]:
    """The logits and the gradient of every parameter, in float64 on the CPU."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    found = {"logits": out.logits, **{name: p.grad for name, p in model.named_parameters()}}
    return {name: x.detach().double().cpu() for name, x in found.items()}


@pytest.mark.cuda
@every
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_gpu_computes_what_the_cpu_computes(line: Line, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients, with heads of a width that the kernels serve; schemes with a bias by distance go through them."""
    calls = []
    kernel = lm_attention.biased_attention
    monkeypatch.setattr(lm_attention, "biased_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    length = WINDOW if not line.endless else 300
    model, ids = build(line.spec, head_dim=32), tokens(2, length)
    wanted = answers(copy.deepcopy(model).double(), ids)
    got = answers(model.cuda(), ids.cuda(), bf16)
    for name, x in wanted.items():
        off = float((got[name] - x).norm() / x.norm())
        most = (
            1e-3 if not bf16 else 0.3 if "place" in name else 0.1
        )  # a scheme's few numbers sum up what mostly cancels
        assert off < most, f"{name}: {off:.1e}"
    assert bool(calls) == model.model.place.defines("bias")


@pytest.mark.cuda
@where("endless")
def test_gpu_reads_in_chunks(line: Line) -> None:
    model, ids = build(line.spec, head_dim=32).cuda(), tokens(2, 300).cuda()
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for begin, end in ((0, 100), (100, 170), (170, 171), (171, 300)):
            parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), rtol=1e-3, atol=1e-3)


def test_classification_reads_real_tokens_only() -> None:
    for kind in ("encoder", "decoder"):
        model = build("rope", LongspanForSequenceClassification, kind=kind, num_labels=3)
        ids = tokens(2, 20)
        mask = torch.ones_like(ids)
        mask[0, 12:] = 0
        got = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(got[:1], logits(model, ids[:1, :12]), **CLOSE)
        model(ids, labels=torch.tensor([0, 2])).loss.backward()


@pytest.mark.parametrize("spec", ["rope", "alibi", "kerple", "sandwich", "t5", "xpos", "nope"])
@pytest.mark.parametrize("method", ["window:size=9", "bca:size=10"])
def test_methods_that_hide_keys_keep_the_scheme(spec: str, method: str) -> None:
    """A window over a scheme's own attention: what it sees, and nothing else, by the bias of the true distances."""
    model, ids = build(spec, num_hidden_layers=1), tokens(2, 40)
    position = torch.arange(40)
    first = position - 8 if method.startswith("window") else (position // 5 - 1) * 5
    mask = (position[None] <= position[:, None]) & (position[None] >= first[:, None])
    wanted = logits(model, ids, attention_mask=mask[None, None])
    with applied(model, method):
        torch.testing.assert_close(logits(model, ids), wanted, **CLOSE)
        cache, parts = DynamicCache(), []
        with torch.no_grad():
            for begin, end in ((0, 21), (21, 33), *((t, t + 1) for t in range(33, 40))):
                parts.append(model(ids[:, begin:end], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted, **CLOSE)


def test_methods_that_hide_keys_refuse_places() -> None:
    for spec in ("sinusoidal", "learned", "tupe"):
        with pytest.raises(NotSupported):
            apply(build(spec), "window:size=9")


@every
def test_gradients_rest_on_no_subgradient_at_a_tie(line: Line) -> None:
    """Bounds of parameters, distances and positions: none may take a gradient that a version of torch chooses."""
    model, ids = build(line.spec).train(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for name, parameter in model.named_parameters():
        if name.endswith("place.r2") or name.endswith("inner.r2"):  # of KERPLE, 0.01 being the least that there is
            torch.nn.init.constant_(parameter, 0.01)
    with UndefinedAtTies():
        model(ids, attention_mask=mask, use_cache=False).logits.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
