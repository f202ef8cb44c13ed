"""The plan against what really happens: cache bytes, operations, and the built-in model's memory and time."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig

import tiny
from longspan import models, plan
from longspan.apply import apply
from longspan.core.facts import facts_of
from longspan.core.method import NoMethod, catalogue, combination
from longspan.meter import Meter, weights_bytes
from longspan.reading.prefill import chunked_prefill
from longspan.util.errors import LongspanError, NotSupported, SpecError

MEASURE = plan.measure
SPEEDS = plan.Speeds(product=1e9, attention=1e9, copying=1e9, reading=1e9, operation=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights: a plan needs none."""
    path = tiny.folder(tmp_path_factory.mktemp("tiny"))
    (path / "model.safetensors").unlink()
    return path


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "model" not in request.keywords:
        monkeypatch.setattr(plan, "measure", lambda *_: SPEEDS)


def _case(config: LlamaConfig, output_tokens: int = 0) -> plan._Case:
    return plan._Case(facts_of(config), config, torch.float32, torch.device("cpu"), 10**8, output_tokens)


def test_weights_and_cache_are_those_of_a_run(folder: Path) -> None:
    model = tiny.model()
    for spec, length in [("none", 100), ("yarn:factor=4", 400), ("streaming:sinks=4,window=60", 400)]:
        apply(model, spec)
        meter = Meter("cpu", model)
        read = chunked_prefill(model, [5] * length, meter=meter)
        meter.cache(read.cache)
        made = plan.plan(folder, length=length, method=spec, device="cpu", output_tokens=0)
        report = meter.report()
        assert made.needs.weights == report["weights_bytes"] == weights_bytes(model)
        if spec.startswith("streaming"):  # it holds the sinks' original keys beside the ring
            assert 1 <= report["cache_bytes"] / made.needs.cache < 1.1
        else:
            assert made.needs.cache == report["cache_bytes"]


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(tied: bool) -> None:
    config = tiny.model().config
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
    length = 96
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, length, dtype=torch.long), logits_to_keep=1)
    counted = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counted.items() if "bmm" in str(op))
    case, none = _case(config), combination("none")
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert plan.product_flops(case, length) - 2 * norms * length == sum(counted.values()) - attention
    # torch counts the whole square, and some versions the rotation; a causal pass needs the lower half with the diagonal
    assert plan.attention_flops(case, none, length) == pytest.approx(attention * (length + 1) / (2 * length), rel=1e-3)


def test_a_window_costs_a_band_of_the_square() -> None:
    case = _case(tiny.model().config)
    seen = sum(min(t + 1, 64) for t in range(500))
    for spec, kept in (("streaming:sinks=4,window=60", 64), ("window:size=64", 500)):
        band = combination(spec)
        assert plan.attention_flops(case, band, 500) == 4 * 2 * 4 * 16 * seen
        assert plan.cached_tokens(case.facts, band, 500) == kept
    mistral = MistralConfig(
        **{k: getattr(tiny.model().config, k) for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
    )
    mistral.sliding_window = 64
    assert plan.cached_tokens(facts_of(mistral), combination("none"), 500) == 64


def test_time_grows_as_the_method_says() -> None:
    case = _case(tiny.model().config)
    dense, band, turned = (combination(s) for s in ("none", "streaming:sinks=4,window=60", "dynamic-ntk"))
    read, write = plan.seconds(case, dense, 2**16, SPEEDS)
    assert plan.seconds(case, dense, 2**17, SPEEDS)[0] == pytest.approx(4 * read, rel=0.1)
    assert plan.seconds(case, band, 2**17, SPEEDS)[0] == pytest.approx(
        2 * plan.seconds(case, band, 2**16, SPEEDS)[0], rel=0.1
    )
    assert plan.seconds(case, band, 2**17, SPEEDS)[1] == plan.seconds(case, band, 2**16, SPEEDS)[1] < write
    assert plan.seconds(case, turned, 2**16, SPEEDS)[0] > 2 * read
    assert plan.seconds(case, combination("window:size=64"), 2**16, SPEEDS)[0] < read


def test_longest_length_is_the_last_that_fits() -> None:
    case = _case(tiny.model().config, output_tokens=10)
    none, free = combination("none"), 2 * 10**8
    longest = plan.longest(case, none, free)
    assert longest is not None
    assert plan.needed(case, none, longest).total <= free < plan.needed(case, none, longest + 1).total
    assert plan.longest(case, none, 10**6) == 0
    assert plan.longest(case, combination("streaming"), 10**12) is None


def test_a_machine_that_is_too_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_process_bytes", lambda _: 10**8)
    monkeypatch.setattr(plan, "available", lambda _: 10**8 + 2 * 10**6)
    made = plan.plan(folder, length=4096, device="cpu")
    assert not made.fits and made.longest is not None and made.longest < 4096
    assert {row.spec: row.fits for row in made.methods}["none"] is False


def test_every_method_is_judged(folder: Path) -> None:
    made = plan.plan(folder, length=500, device="cpu")
    rows = {row.spec.partition(":")[0]: row for row in made.methods}
    assert next(iter(rows)) == "none" and set(rows) == {
        name for name, cls in catalogue().items() if NoMethod.works_on in cls.works_on
    }
    assert rows["none"].legal and rows["none"].reason == "made for up to 128 tokens"
    assert rows["yarn"].spec == "yarn:factor=4" and not rows["yarn"].reason
    assert not rows["longrope"].legal and "factors" in rows["longrope"].reason and rows["longrope"].needs is None
    assert rows["streaming"].needs is not None and rows["streaming"].legal
    scaled = tiny.model().config
    scaled.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    scaled.save_pretrained(folder.parent / "scaled")
    again = {
        row.spec.partition(":")[0]: row for row in plan.plan(folder.parent / "scaled", length=500, device="cpu").methods
    }
    assert not again["yarn"].legal and "scaled already" in again["yarn"].reason


def test_length_settles_the_method(folder: Path) -> None:
    assert plan.plan(folder, length=500, method="yarn", device="cpu").method == "yarn:factor=4"


def test_half_the_bytes_in_half_precision(folder: Path) -> None:
    single = plan.plan(folder, length=500, device="cpu").needs
    half = plan.plan(folder, length=500, device="cpu", dtype="bf16").needs
    assert (single.weights, single.cache) == (2 * half.weights, 2 * half.cache)


def test_data_and_terminal(folder: Path) -> None:
    made = plan.plan(folder, length=500, method="streaming", device="cpu", output_tokens=10)
    data = json.loads(json.dumps(made.to_dict()))
    assert data["estimate"] is True and data["total_bytes"] == made.needs.total
    assert data["total_s"] == pytest.approx(made.prefill_s + 10 * made.decode_s_per_token)
    text = io.StringIO()
    plan.terminal(replace(made, model="[bold]m[/bold]"), Console(file=text, width=160))
    assert "[bold]m[/bold] with streaming:window=124, 500 tokens in and 10 out: fits" in text.getvalue()
    assert "estimates" in text.getvalue()
    assert "not here: needs factors" in text.getvalue() and "made for up to 128 tokens" in text.getvalue()
    narrow = io.StringIO()
    plan.terminal(made, Console(file=narrow, width=60))
    assert "…" not in narrow.getvalue()  # no figure is cut
    assert "longrope: not here: needs factors" in narrow.getvalue()


def test_what_a_user_can_get_wrong(folder: Path, tmp_path: Path) -> None:
    for length, output in [(0, 1), (-1, 1), (5, -1)]:
        with pytest.raises(SpecError, match="length"):
            plan.plan(folder, length=length, output_tokens=output)
    with pytest.raises(SpecError, match="no method"):
        plan.plan(folder, length=5, method="yarm")
    with pytest.raises(LongspanError, match="there is no folder"):
        plan.plan(tmp_path / "missing", length=5)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(NotSupported, match="rotary"):
        plan.plan(tmp_path / "gpt2", length=5, method="yarn:factor=2")
    made = plan.plan(tmp_path / "gpt2", length=5, device="cpu")
    assert all("position" in row.reason for row in made.methods if not row.legal and row.spec != "longrope")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_speeds_are_measured(device: str) -> None:
    speeds = MEASURE(torch.device(device), torch.float32, tiny.model().config)
    assert all(v > 0 for v in vars(speeds).values())
    assert speeds.operation < 1e-2


@pytest.mark.model
@pytest.mark.slow
def test_built_in_model_within_a_factor_of_two() -> None:
    """Time and memory of a real prefill, against the plan of the same moment. Where other work shares the cores a single
    comparison says little, so one of three must agree."""
    length = 2048
    model, _ = models.load("smollm2-135m", device="cpu")
    ratios = []
    for _ in range(3):
        made = plan.plan("smollm2-135m", length=length, device="cpu", output_tokens=0)
        meter = Meter("cpu", model)
        chunked_prefill(model, (torch.arange(length) * 7919 % 49_000).tolist(), meter=meter)
        report = meter.report()
        ratios.append(made.prefill_s / report["prefill_s"])
        held = made.needs.total - made.needs.weights  # this process holds the weights already
        assert 0.5 < held / report["peak_prefill_bytes"] < 2
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"estimated over measured seconds: {ratios}")
