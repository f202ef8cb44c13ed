"""State spaces: the starting matrix, kernels against dense recurrences, the recurrence in pieces, the layer, what trains how."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from longspan.attention.s4 import StateSpaceLayer
from longspan.core.method import parse
from longspan.engine.state_space import attention as state_space
from longspan.engine.state_space.attention import (
    DiagonalRecurrence,
    LowRankRecurrence,
    Modes,
    Recurrence,
    cauchy_kernel,
    convolve,
    hippo,
    normal_plus_low_rank,
    starting_poles,
    vandermonde_kernel,
)
from longspan.lm import LongspanConfig, LongspanForCausalLM, LongspanForMaskedLM
from longspan.util.errors import NotSupported, SpecError

SIZES = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "position": "nope"}
STEPS = (0.1, 0.01, 0.001)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def legs(n: int, dtype: torch.dtype = torch.complex128) -> tuple[Modes, np.ndarray]:
    """LegS in three channels of different steps, read off by random rows (3, n), which are returned as well."""
    poles, low, entry, v = normal_plus_low_rank(n)
    rows = random(len(STEPS), n).numpy()

    def shared(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(dtype).expand(len(STEPS), -1)

    step = torch.tensor(STEPS, dtype=dtype.to_real())
    return Modes(step, shared(poles), shared(entry), torch.from_numpy(rows @ v).to(dtype), shared(low)), rows


def dense(a: np.ndarray, b: np.ndarray, row: np.ndarray, step: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and the last state of the bilinear recurrence, by the matrix itself, a token at a time."""
    eye = np.eye(len(a))
    moved = np.linalg.solve(eye - step / 2 * a, eye + step / 2 * a)
    entering = np.linalg.solve(eye - step / 2 * a, step * b)
    state, out = np.zeros(len(a)), []
    for number in x:
        state = moved @ state + entering * number
        out.append(row @ state)
    return np.array(out), state


def impulse(length: int) -> np.ndarray:
    return np.eye(1, length)[0]


def truncated(modes: Modes, length: int) -> Modes:
    return replace(modes, exit=LowRankRecurrence(modes).truncated(modes.exit, length))


def test_legs_is_normal_up_to_a_part_of_rank_one() -> None:
    n = 64
    wanted = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            wanted[i, j] = -(i + 1) if i == j else -math.sqrt((2 * i + 1) * (2 * j + 1))
    a, b = hippo(n)
    np.testing.assert_allclose(a, wanted)
    np.testing.assert_allclose(b, [math.sqrt(2 * i + 1) for i in range(n)])
    poles, low, entry, v = normal_plus_low_rank(n)
    assert (poles.imag > 0).all()
    np.testing.assert_allclose(poles.real, -0.5)
    both = np.concatenate((v, v.conj()), axis=1)
    np.testing.assert_allclose(both @ both.conj().T, np.eye(n), atol=1e-12)
    p = np.concatenate((low, low.conj()))
    again = both @ (np.diag(np.concatenate((poles, poles.conj()))) - np.outer(p, p.conj())) @ both.conj().T
    np.testing.assert_allclose(again, a, atol=1e-10)
    np.testing.assert_allclose(both @ np.concatenate((entry, entry.conj())), b, atol=1e-10)


@pytest.mark.parametrize("n", [4, 64])
@pytest.mark.parametrize("length", [1, 2, 37, 64, 300])
def test_cauchy_kernel_is_the_dense_recurrence(n: int, length: int) -> None:
    modes, rows = legs(n)
    got = cauchy_kernel(truncated(modes, length), length).numpy()
    wanted = [dense(*hippo(n), row, step, impulse(length))[0] for row, step in zip(rows, STEPS, strict=True)]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


def test_cauchy_kernel_in_single_precision() -> None:
    modes, rows = legs(64, torch.complex64)
    got = cauchy_kernel(truncated(modes, 4096), 4096).numpy()
    wanted = np.array([dense(*hippo(64), row, s, impulse(4096))[0] for row, s in zip(rows, STEPS, strict=True)])
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_doubling_and_restoring_what_is_kept_of_c() -> None:
    modes, _ = legs(16)
    recurrence = LowRankRecurrence(modes)
    short, long = truncated(modes, 25), truncated(modes, 50)
    torch.testing.assert_close(recurrence.doubled(short.exit, 25), long.exit)
    torch.testing.assert_close(recurrence.restored(short.exit, 25), modes.exit)
    torch.testing.assert_close(cauchy_kernel(long, 50)[:, :25], cauchy_kernel(short, 25))


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("start", ["legs", "lin", "inv", "real"])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_vandermonde_kernel_is_the_sum_of_powers(rule: Any, start: Any, length: int) -> None:
    n = 8
    poles = {
        "lin": [-0.5 + 1j * math.pi * k for k in range(4)],
        "inv": [-0.5 + 1j * (8 / math.pi) * (8 / (2 * k + 1) - 1) for k in range(4)],
        "real": [-(k + 1) + 0j for k in range(4)],
        "legs": sorted((e for e in np.linalg.eigvals(_normal_part(n)) if e.imag > 0), key=lambda e: e.imag),
    }[start]
    got_poles = torch.from_numpy(starting_poles(start, n))
    np.testing.assert_allclose(got_poles, poles, atol=1e-10)
    entry, exit = (torch.complex(random(3, 4, seed=s), random(3, 4, seed=s + 1)) for s in (1, 3))
    modes = Modes(torch.tensor(STEPS, dtype=torch.float64), got_poles.expand(3, -1), entry, exit)
    wanted = np.zeros((3, length))
    for h, step in enumerate(STEPS):
        for pole, b, c in zip(poles, entry[h].tolist(), exit[h].tolist(), strict=True):
            if rule == "zoh":
                moved, entering = np.exp(step * pole), (np.exp(step * pole) - 1) / pole * b
            else:
                moved, entering = (1 + step / 2 * pole) / (1 - step / 2 * pole), step * b / (1 - step / 2 * pole)
            wanted[h] += [2 * (c * moved**k * entering).real for k in range(length)]
    np.testing.assert_allclose(vandermonde_kernel(DiagonalRecurrence(modes, rule), length), wanted, atol=1e-10)


def _normal_part(n: int) -> np.ndarray:
    a, _ = hippo(n)
    p = np.sqrt(np.arange(n) + 0.5)
    return a + np.outer(p, p)


def test_kernels_have_the_gradient_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all parameters, against C·(Āˡ)·B̄ by matrices; in pieces as well."""
    modes, _ = legs(8)
    modes = truncated(modes, 30)
    leaves = [
        x.detach().clone().requires_grad_() for x in (modes.step, modes.poles, modes.entry, modes.exit, modes.low)
    ]
    step, poles, entry, exit, low = leaves
    full = [torch.cat((x, x.conj()), dim=1) for x in (poles, entry, exit, low)]
    a = torch.diag_embed(full[0]) - full[3][:, :, None] * full[3].conj()[:, None]
    eye, half = torch.eye(8, dtype=a.dtype), step[:, None, None] / 2
    moved = torch.linalg.solve(eye - half * a, eye + half * a)
    entering = torch.linalg.solve(eye - half * a, step[:, None] * full[1])
    restored = torch.linalg.solve((eye - torch.linalg.matrix_power(moved, 30)).mT, full[2])
    states = [entering]
    for _ in range(29):
        states.append((moved @ states[-1][..., None])[..., 0])
    wanted = (torch.stack(states, dim=-1) * restored[..., None]).sum(1).real
    pull = random(3, 30, seed=9)
    expected = torch.autograd.grad((wanted * pull).sum(), leaves)
    for at_once in (2**24, 12 * 4):
        monkeypatch.setattr(state_space, "NUMBERS_AT_ONCE", at_once)
        got = cauchy_kernel(Modes(*leaves), 30)
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(torch.autograd.grad((got * pull).sum(), leaves), expected)


@pytest.mark.parametrize("kind", ["low rank", "zoh"])
def test_kernels_keep_no_number_for_every_mode_and_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the backward pass, in numbers; channels × modes × length would be 786,432."""
    monkeypatch.setattr(state_space, "NUMBERS_AT_ONCE", 2**12)
    kept = dict[int, int]()

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 8
        return x

    modes, _ = legs(64)
    modes = replace(truncated(modes, 2**13), exit=modes.exit.clone().requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        if kind == "zoh":
            vandermonde_kernel(DiagonalRecurrence(modes, "zoh"), 2**13)
        else:
            cauchy_kernel(modes, 2**13)
    assert 0 < sum(kept.values()) < 10 * 3 * 2**13


def recurrences() -> list[Recurrence]:
    modes, _ = legs(16)
    return [LowRankRecurrence(modes), DiagonalRecurrence(modes, "zoh"), DiagonalRecurrence(modes, "bilinear")]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("cut", [1, 70, 200])
def test_recurrence_in_pieces_is_the_convolution(number: int, cut: int) -> None:
    recurrence, x = recurrences()[number], random(2, 3, 300, seed=5)
    state, outputs = torch.zeros(2, 3, 16, dtype=torch.float64), []
    for t in range(300):
        state = recurrence.step(state, x[..., t])
        outputs.append(recurrence.read(state))
        if t + 1 == cut:
            middle = state
    wanted = torch.stack(outputs, dim=-1)

    def kernel(length: int) -> Tensor:
        if isinstance(recurrence, DiagonalRecurrence):
            return vandermonde_kernel(recurrence, length)
        return cauchy_kernel(truncated(legs(16)[0], length), length)

    torch.testing.assert_close(convolve(x, kernel(300)), wanted)
    torch.testing.assert_close(recurrence.advance(x[..., :cut]), middle)
    torch.testing.assert_close(
        convolve(x[..., cut:], kernel(300 - cut)) + recurrence.respond(middle, 300 - cut), wanted[..., cut:]
    )
    after = recurrence.advance(x[..., cut:]) + recurrence.times(middle[..., None], 300 - cut)[..., 0]
    torch.testing.assert_close(after, state)
    counts = torch.tensor([0, 5])
    torch.testing.assert_close(recurrence.after(state, counts)[0], state[0])
    torch.testing.assert_close(recurrence.after(state, counts)[1], recurrence.times(state[1:, ..., None], 5)[0, ..., 0])


def layer(spec: str, *, causal: bool = True, **settings: Any) -> StateSpaceLayer:
    config = LongspanConfig(**{**SIZES, "attention": spec, "kind": "decoder" if causal else "encoder", **settings})
    torch.manual_seed(3)
    built = parse(spec).methods[0].build(config, 0, config.build_position_encoding(causal=causal), causal=causal)  # type: ignore[attr-defined]
    assert isinstance(built, StateSpaceLayer)
    built.ssm.draw_weights()
    return built.double()


@pytest.mark.parametrize("number", range(3))
def test_a_signal_sampled_half_as_often_takes_twice_the_step(number: int) -> None:
    """The systems are continuous: with twice the step they read every other sample and say every other output (Gu 2022, 3.1)."""
    modes, _ = legs(16)
    smooth = torch.linspace(0, 12, 2000, dtype=torch.float64).sin().expand(1, 3, -1)
    outputs = []
    for stride in (1, 2):
        own = replace(modes, step=modes.step * stride)
        recurrence = [LowRankRecurrence(own), DiagonalRecurrence(own, "zoh"), DiagonalRecurrence(own, "bilinear")][
            number
        ]
        state, said = torch.zeros(1, 3, 16, dtype=torch.float64), []
        for value in smooth[..., ::stride].unbind(-1):
            state = recurrence.step(state, value)
            said.append(recurrence.read(state))
        outputs.append(torch.stack(said, dim=-1))
    often, seldom = outputs[0][..., ::2], outputs[1]
    assert (often - seldom).norm() < 0.05 * often.norm() < 0.05 * (often + seldom).norm()


@pytest.mark.parametrize("spec", ["s4:states=8,length=16", "s4:states=8,length=7,systems=2", "s4d:states=8,init=inv"])
@pytest.mark.parametrize("causal", [True, False])
def test_layer_is_its_formula(spec: str, causal: bool) -> None:
    """Every tap of the kernels by the recurrence; direct path, GELU, linear layer and gate."""
    made, x = layer(spec, causal=causal), random(2, 20, 16, seed=7)
    taps = []
    for direction in range(1 if causal else 2):
        recurrence = made.ssm.recurrence(direction)
        state = recurrence.step(torch.zeros(1, 16, 8, dtype=torch.float64), torch.ones(1, 16, dtype=torch.float64))
        taps.append([])
        for _ in range(20):
            taps[-1].append(recurrence.read(state)[0])
            state = recurrence.step(state, torch.zeros(1, 16, dtype=torch.float64))
    mixed = torch.zeros_like(x)
    for t in range(20):
        for s in range(20):
            if s <= t:
                mixed[:, t] += taps[0][t - s] * x[:, s]
            elif not causal:
                mixed[:, t] += taps[1][s - t - 1] * x[:, s]
    mixed = F.gelu(mixed + made.ssm.direct * x)
    value, gate = (mixed @ made.o_proj.weight.T + made.o_proj.bias).chunk(2, dim=-1)
    torch.testing.assert_close(made(x)[0], value * gate.sigmoid())


@pytest.mark.parametrize("spec", ["s4:states=8,length=16", "s4d:states=8"])
def test_later_tokens_change_earlier_ones_by_rounding_alone(spec: str) -> None:
    made, x = layer(spec), random(1, 40, 16, seed=7)
    other = x.clone()
    other[:, 25:] += 1
    torch.testing.assert_close(made(other)[0][:, :25], made(x)[0][:, :25], rtol=0, atol=1e-13)


@pytest.mark.parametrize("spec", ["s4:states=8,length=16", "s4d:states=8"])
def test_padding_anywhere_is_no_time(spec: str) -> None:
    """A text read with padding before, between and after, in chunks and single tokens, is the text without."""
    made, text = layer(spec), random(1, 30, 16, seed=7)
    real = torch.zeros(45, dtype=torch.bool)
    real[torch.tensor([*range(3, 10), *range(12, 25), *range(30, 33), 40, *range(42, 45), 34, 35, 36])] = True
    x = random(1, 45, 16, seed=8)
    x[:, real] = text
    wanted = made(text)[0]
    torch.testing.assert_close(made(x, padding=real[None])[0][:, real], wanted)
    cache, parts = DynamicCache(), []
    for begin, end in ((0, 15), (15, 24), *((t, t + 1) for t in range(24, 38)), (38, 43), (43, 44), (44, 45)):
        parts.append(made(x[:, begin:end], past_key_values=cache, padding=real[None, :end])[0])
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, real], wanted)


def test_weights_start_as_the_paper_says() -> None:
    for spec in ("s4", "s4d"):
        made = layer(spec, hidden_size=256).ssm
        steps = made.log_step.exp()
        assert 1e-3 <= steps.min() < 2e-3 < 0.05 < steps.max() <= 0.1
        assert made.log_decay.shape == (1, 32)
        torch.testing.assert_close(made.log_decay.exp(), torch.full((1, 32), 0.5, dtype=torch.float64))
    low, high = (layer(f"s4:length={n}", hidden_size=64).ssm for n in (8, 4096))
    ways = [m.recurrence().modes.exit for m in (low, high)]  # type: ignore[attr-defined]
    torch.testing.assert_close(*ways, rtol=1e-3, atol=1e-3)  # C itself does not depend on the length it is kept for


def test_weights_stay_single_precision_when_loaded_in_half(tmp_path: Path) -> None:
    model = LongspanForCausalLM(LongspanConfig(**SIZES, attention=["s4:states=8", "s4d:states=8"])).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for name, weight in again.named_parameters():
        assert weight.dtype == (torch.float32 if ".ssm." in name else torch.bfloat16), name
    ids = torch.arange(2, 50)[None]
    with torch.no_grad():
        got, cache = again(ids), DynamicCache()
        assert got.logits.dtype == torch.bfloat16
        torch.testing.assert_close(got.logits.float(), model(ids).logits, rtol=0.05, atol=0.02)
        again(ids, past_key_values=cache)
        assert all(layer.tensors["state"].dtype == torch.float32 for layer in cache.layers)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(ids).logits.float(), model(ids).logits.float(), rtol=0.05, atol=0.02)


def test_a_feed_forward_network_follows_where_asked() -> None:
    model = LongspanForCausalLM(LongspanConfig(**SIZES, attention=["s4", "s4:mlp=true"]))
    assert [hasattr(layer, "mlp") for layer in model.model.layers] == [False, True]


def test_what_cannot_be_is_refused() -> None:
    for spec in (
        "s4:states=7",
        "s4:states=0",
        "s4:dt_min=0.2",
        "s4:lr=0",
        "s4:systems=0",
        "s4:length=0",
        "s4d:init=random",
    ):
        with pytest.raises(SpecError):
            parse(spec)
    with pytest.raises(SpecError, match="divisor"):
        layer("s4:systems=3")
    with pytest.raises(NotSupported, match="sinusoidal"):
        layer("s4", position="rope")
    with pytest.raises(NotSupported, match="hidden_dropout"):
        layer("s4", attention_dropout=0.1)
    with pytest.raises(SpecError, match="order"):
        LongspanForMaskedLM(LongspanConfig(**SIZES, kind="encoder"))


def test_listops_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Far above the commonest answer after some steps, without attention; left and taken up again on the way."""
    script = Path(__file__).parents[2] / "reproductions" / "s4_listops.py"
    main = runpy.run_path(str(script))["main"]
    small = ["--small", "--steps", "100", "--test-texts", "500", "--out", str(tmp_path)]
    assert main([*small, "--seconds", "0.2"])["steps_done"] < 100
    made = main([*small, "--seconds", "600"])
    assert made["steps_done"] == 100 and len(made["losses"]) == 10
    assert made["accuracy_of_the_commonest_answer"] < 0.15
    assert made["interval"][0] > made["accuracy_of_the_commonest_answer"] + 0.1
    assert json.loads((tmp_path / "s4.json").read_text())["accuracy"] == made["accuracy"]
    shuffled = main([*small, "--steps", "10", "--shuffle"])
    assert shuffled["accuracy"] < made["accuracy"]
    (tmp_path / "s4-shuffled.json").write_text(json.dumps({**shuffled, "steps_done": 100}))
    main([*small, "--seconds", "600"])
    assert "holds: order is used" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other settings"):
        main([*small, "--seconds", "600", "--seed", "3"])
