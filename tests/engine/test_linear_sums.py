"""Linear attention in all its forms against its formula, token by token, in float64: forward, backward, state, padding."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from longspan.engine.linear import attention as linear
from longspan.engine.linear.attention import Kernel, bidirectional, causal, read
from ties import UndefinedAtTies

EXACT = {"rtol": 1e-10, "atol": 1e-10}
W = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x)


def logarithm(x: Tensor) -> Tensor:
    return x @ W.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


PLAIN, EXPONENTIAL = Kernel(plain), Kernel(logarithm, logarithms=True)
BARE = Kernel(lambda x: x, normalised=False)
FEATURES: dict[Kernel, Callable[[Tensor], Tensor]] = {
    PLAIN: plain,
    EXPONENTIAL: lambda x: logarithm(x).exp(),
    BARE: lambda x: x,
}
kernels = pytest.mark.parametrize("kernel", FEATURES, ids=["plain", "exponential", "bare"])


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK", 16)
    monkeypatch.setattr(linear, "SEGMENT", 48)


def inputs(length: int, dtype: torch.dtype = torch.float64, std: float = 1.0) -> list[Tensor]:
    """Two rows, four query heads on two key-value heads, eight channels; values have five."""
    draw = torch.Generator().manual_seed(length)
    shapes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 5))
    return [(torch.randn(s, generator=draw, dtype=torch.float64) * std).to(dtype).requires_grad_() for s in shapes]


def by_formula(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, *, ahead: bool = False) -> Tensor:
    """For every row, head and token the sums of the paper's equations, over those tokens alone that it sees."""
    phi_q, phi_k = FEATURES[kernel](q), FEATURES[kernel](k)
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = torch.arange(q.shape[2]) if ahead else torch.arange(t + 1)
                if real is not None:
                    seen = seen[real[b, seen]]
                weights = phi_k[b, h // 2, seen] @ phi_q[b, h, t]
                if kernel.normalised and len(seen):
                    weights = weights / weights.sum()
                rows.append(weights @ v[b, h // 2, seen])
    return torch.stack(rows).view(*q.shape[:3], -1)


def same_with_gradients(got: Tensor, wanted: Tensor, given: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, **EXACT)
    pull = torch.randn(got.shape, dtype=got.dtype)
    ours = torch.autograd.grad((got * pull).sum(), given)
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), given), **EXACT)


@kernels
@pytest.mark.parametrize("length", [1, 16, 37, 100])
def test_causal_is_its_formula(kernel: Kernel, length: int) -> None:
    given = inputs(length)
    same_with_gradients(causal(*given, kernel)[0], by_formula(kernel, *given, None), given)


@kernels
@pytest.mark.parametrize("length", [1, 50])
def test_bidirectional_is_its_formula(kernel: Kernel, length: int) -> None:
    given = inputs(length)
    same_with_gradients(bidirectional(*given, kernel), by_formula(kernel, *given, None, ahead=True), given)


@kernels
@pytest.mark.parametrize("ahead", [False, True])
def test_gradients_are_the_formula_s_where_the_greatest_feature_meets_its_bound(kernel: Kernel, ahead: bool) -> None:
    """A head's greatest logarithm is at the bound by construction, so no version's rule for ties may enter."""
    given = inputs(60)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[0, :19] = real[1, 53:] = False
    always_visible = real[:, None, :, None]
    with UndefinedAtTies():
        got = bidirectional(*given, kernel, real) if ahead else causal(*given, kernel, real=real)[0]
        same_with_gradients(got * always_visible, by_formula(kernel, *given, real, ahead=ahead) * always_visible, given)


@kernels
def test_padding_is_not_there(kernel: Kernel) -> None:
    given = inputs(60)
    real = torch.ones(2, 60, dtype=torch.bool)
    real[0, :19] = real[1, 53:] = real[1, 20] = False
    always_visible = real[:, None, :, None]
    for got, ahead in ((causal(*given, kernel, real=real)[0], False), (bidirectional(*given, kernel, real), True)):
        assert got.isfinite().all()
        same_with_gradients(got * always_visible, by_formula(kernel, *given, real, ahead=ahead) * always_visible, given)


@kernels
def test_state_is_handed_over(kernel: Kernel) -> None:
    """Token by token, in uneven pieces, and over tokens that nobody asked: outputs, the last state and gradients."""
    q, k, v = given = inputs(100)
    wanted, last = causal(*given, kernel)
    for cuts in ([*range(101)], [0, 30, 31, 95, 100]):
        state, parts = None, []
        for begin, end in itertools.pairwise(cuts):
            part, state = causal(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], kernel, state)
            parts.append(part)
        assert state is not None
        torch.testing.assert_close(tuple(state), tuple(last), **EXACT)
        wanted, _ = causal(*given, kernel)
        same_with_gradients(torch.cat(parts, dim=2), wanted, given)
    state = read(k[:, :, :70], v[:, :, :70], kernel)
    torch.testing.assert_close(
        causal(q[:, :, 70:], k[:, :, 70:], v[:, :, 70:], kernel, state)[0], wanted[:, :, 70:], **EXACT
    )


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_later_changes_no_bit(kernel: Kernel, dtype: torch.dtype) -> None:
    q, k, v = inputs(100, dtype)
    before, _ = causal(q, k, v, kernel)
    for at in (99, 64, 50):
        later = torch.arange(100)[:, None] >= at
        after, _ = causal(q, torch.where(later, k * 6, k), torch.where(later, v * 6, v), kernel)
        assert torch.equal(after[:, :, :at], before[:, :, :at])
        assert not torch.equal(after[:, :, at:], before[:, :, at:])
    reached = torch.autograd.grad(before[:, :, 40].float().sum(), (k, v))
    assert all(not g[:, :, 41:].any() and g[:, :, :41].any() for g in reached)


def test_half_precision_is_summed_in_float32() -> None:
    """Rounding of inputs and output is all that is lost, and autocast changes nothing."""
    wide = inputs(100)
    narrow = [x.detach().to(torch.bfloat16) for x in wide]
    for kernel in (PLAIN, EXPONENTIAL):
        exact = by_formula(kernel, *(x.double() for x in narrow), None)
        got, state = causal(*narrow, kernel)
        assert got.dtype == torch.bfloat16 and state.sums.dtype == torch.float32
        torch.testing.assert_close(got, exact.to(torch.bfloat16), rtol=2**-7, atol=1e-3)
        both = bidirectional(*narrow, kernel)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(causal(*narrow, kernel)[0], got)
            assert torch.equal(bidirectional(*narrow, kernel), both)


@pytest.mark.parametrize("std", [5.0, 60.0])
def test_great_logarithms_stay_numbers(std: float) -> None:
    """Features from e^-1000s to e^1000s: finite forward and backward, and right wherever float64's range holds them."""
    given = inputs(100, torch.float32, std)
    got, _ = causal(*given, EXPONENTIAL)
    assert got.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), given))
    if std == 5:
        exact = by_formula(EXPONENTIAL, *(x.double() for x in given), None)
        assert exact.isfinite().all()
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)


def test_training_keeps_a_sum_for_each_segment_and_no_features() -> None:
    """Features of a text longer than a segment are made once in the forward pass and once more in the backward pass."""
    made = []

    def phi(x: Tensor) -> Tensor:
        made.append(x.shape[2])
        return plain(x)

    given = inputs(100)
    got, _ = causal(*given, Kernel(phi))
    forward = sum(made)
    assert forward == 2 * 100  # queries and keys
    got.sum().backward()
    assert sum(made) == 2 * forward
    made.clear()
    with torch.no_grad():
        causal(*given, Kernel(phi))
    assert sum(made) == forward


def test_compiles_in_one_piece() -> None:
    given = inputs(70)
    compiled = torch.compile(lambda q, k, v: causal(q, k, v, EXPONENTIAL)[0], fullgraph=True, backend="aot_eager")
    same_with_gradients(compiled(*given), causal(*given, EXPONENTIAL)[0], given)


def test_training_memory_grows_with_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forward pass leaves behind for each token of a head: outputs and its share of a sum, not its 256 features."""
    monkeypatch.setattr(linear, "SEGMENT", 512)
    wide = torch.randn(256, 8)
    kernel = Kernel(lambda x: x @ wide.T, logarithms=True)
    left = []
    for length in (2048, 8192):
        q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as memory:
            out, _ = causal(q, k, v, kernel)
        left.append(sum(e.self_cpu_memory_usage for e in memory.key_averages()) / (2 * length))
        out.sum().backward()
    assert left[1] < 1.1 * left[0]
    assert left[1] < 256 * 4 / 4
