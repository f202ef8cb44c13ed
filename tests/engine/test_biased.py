"""The reference against the formula written out, and the kernels against the reference in float64: on CUDA, or on a CPU with
Triton's interpreter (TRITON_INTERPRET=1), where shapes are small and so are the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.engine import kernels
from longspan.engine.biased import attention as biased
from longspan.engine.biased.attention import biased_attention, reference, serves
from longspan.engine.biased.bias import Bias
from longspan.engine.kernels import INTERPRETED
from longspan.util.errors import SpecError

DEVICE = "cpu" if INTERPRETED else "cuda"
TIMES = 1 if INTERPRETED else 8
"""Blocks are 16 or 32 wide in the interpreter and up to 128 on a GPU: lengths grow with them."""
SHORT = [(torch.float16, 32)] + ([] if INTERPRETED else [(torch.bfloat16, 64), (torch.bfloat16, 128)])
"""16-bit dtypes and head sizes; the interpreter has no bfloat16."""
KINDS = ["none", "linear", "log", "power", "table"]


def leaf(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return x.detach().to(dtype).requires_grad_()


def some_bias(kind: Any, heads: int, *, size: int = 9, far: int | None = None, offset: int = 0) -> Bias:
    if kind == "none":
        return Bias()
    if kind == "table":
        return Bias(kind, leaf(torch.randn(heads, size)), far=far, offset=offset)
    a = leaf(torch.rand(heads) * 0.5 + 0.1)
    return Bias(kind, a, None if kind == "linear" else leaf(torch.rand(heads) * 0.5 + 0.2))


def moved(bias: Bias, dtype: torch.dtype, device: str) -> Bias:
    a, b = (None if x is None else leaf(x.to(device), dtype) for x in (bias.a, bias.b))
    return Bias(bias.kind, a, b, bias.far, bias.offset)


def leaves(bias: Bias) -> list[Tensor]:
    return [x for x in (bias.a, bias.b) if x is not None]


def inputs(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int) -> list[Tensor]:
    shapes = (batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def bias_by_hand(bias: Bias, h: int, d: int) -> Tensor | float:
    if bias.kind == "none":
        return 0.0
    if bias.kind == "linear":
        return -bias.a[h] * abs(d)
    if bias.kind == "log":
        return -bias.a[h] * torch.log(1 + bias.b[h] * abs(d))
    if bias.kind == "power":
        return -bias.a[h] * abs(d) ** bias.b[h] if d else 0.0
    d = d if bias.far is None else max(-bias.far, min(bias.far, d))
    return bias.a[h, min(max(d + bias.offset, 0), bias.a.shape[1] - 1)]


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias, scale: float, causal: bool, window: int | None, starts: Any
) -> Tensor:
    """Score by score."""
    (batch, heads, queries, _), (_, kv_heads, keys, _) = query.shape, key.shape
    out = torch.zeros_like(query).clone()
    for b in range(batch):
        first = 0 if starts is None else int(starts[b])
        for h in range(heads):
            shared = h * kv_heads // heads
            for i in range(queries):
                p = keys - queries + i
                seen = [j for j in range(first, keys) if (not causal or j <= p) and (window is None or p - j < window)]
                if p < first or not seen:
                    continue
                scores = [scale * (query[b, h, i] @ key[b, shared, j]) + bias_by_hand(bias, h, p - j) for j in seen]
                weights = torch.stack(scores).softmax(0)
                out[b, h, i] = sum(w * value[b, shared, j] for w, j in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize(
    ("causal", "window", "starts"), [(True, None, None), (True, 3, None), (True, None, [0, 5]), (False, None, [2, 0])]
)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_by_hand(kind: str, causal: bool, window: int | None, starts: list[int] | None) -> None:
    tensors = inputs(2, 4, 2, 5, 8, 4)
    bias = some_bias(kind, 4, size=8, far=3, offset=2) if kind == "table" else some_bias(kind, 4)
    first = None if starts is None else torch.tensor(starts)
    got = reference(*tensors, bias, scale=0.4, causal=causal, window=window, starts=first)
    want = by_hand(*tensors, bias, 0.4, causal, window, starts)
    torch.testing.assert_close(got, want)
    wanted = [*tensors, *leaves(bias)]
    for x, y in zip(
        torch.autograd.grad(got.sin().sum(), wanted), torch.autograd.grad(want.sin().sum(), wanted), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradients_by_differences(kind: str) -> None:
    tensors, bias = inputs(1, 2, 1, 4, 6, 4), some_bias(kind, 2, size=4)

    def run(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        return reference(query, key, value, Bias(kind, *parameters), scale=0.5)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, (*tensors, *leaves(bias)))


@pytest.mark.parametrize("kind", ["log", "table"])
def test_reference_in_blocks_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, bias = inputs(2, 2, 1, 7, 9, 4), some_bias(kind, 2)
    starts = torch.tensor([0, 4])
    results = []
    for most in (2**24, 2 * 2 * 9 * 3, 1):
        monkeypatch.setattr(biased, "MOST_SCORES", most)
        out = reference(*tensors, bias, scale=0.5, window=5, starts=starts)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [*tensors, *leaves(bias)])])
    for others in results[1:]:
        torch.testing.assert_close(results[0], others)


def test_power_of_nothing_has_a_gradient() -> None:
    bias = Bias("power", leaf(torch.ones(1)), leaf(torch.full((1,), 0.5)))
    values = bias.values(torch.arange(3), torch.float64)
    torch.testing.assert_close(values[0].detach(), -torch.tensor([0.0, 1.0, math.sqrt(2)], dtype=torch.float64))
    (slope,) = torch.autograd.grad(values[0, 0], leaves(bias)[1:])
    assert slope == 0


def test_what_does_not_go_together() -> None:
    query, key = torch.zeros(1, 4, 3, 32), torch.zeros(1, 2, 5, 32)
    for make in (
        lambda: Bias("cubic"),  # type: ignore[arg-type]
        lambda: Bias("linear"),
        lambda: Bias("log", torch.ones(4)),
        lambda: Bias("none", torch.ones(4)),
        lambda: Bias("linear", torch.ones(4), far=3),
        lambda: Bias("table", torch.ones(4, 3), offset=3),
        lambda: Bias("table", torch.ones(4, 3), far=0),
    ):
        with pytest.raises(SpecError):
            make()
    for arguments, settings in (
        ((query, key, key, Bias("linear", torch.ones(3))), {}),
        ((key, query, query, Bias()), {}),
        ((query, key, key[:, :, 1:], Bias()), {}),
        ((query[:, :3], key, key, Bias()), {}),
        ((query, key, key, Bias()), {"scale": 0.0}),
        ((query, key, key, Bias()), {"window": 0}),
        ((query, key, key, Bias()), {"window": 2, "causal": False}),
        ((query, key, key, Bias()), {"starts": torch.zeros(2)}),
    ):
        with pytest.raises(SpecError):
            biased_attention(*arguments, **{"scale": 1.0, **settings})


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel the reference answers, in the dtype of the queries."""
    monkeypatch.setattr(kernels, "refusal", lambda device: "there are none")
    query, key = torch.randn(1, 4, 3, 32).bfloat16(), torch.randn(1, 2, 5, 32).bfloat16()
    assert not serves(query, key, Bias())
    out = biased_attention(query, key, key, Bias("linear", torch.ones(4)), scale=0.2)
    assert out.dtype == torch.bfloat16 and out.shape == query.shape


CASES = {
    "square": ((1, 2, 1, 48, 48), {}),
    "ragged, shorter than the keys, padded": ((2, 2, 2, 37, 75), {"starts": [0, 50]}),
    "window": ((1, 4, 2, 75, 75), {"window": 20}),
    "window, padded": ((2, 2, 1, 37, 75), {"window": 9, "starts": [75, 40]}),
    "both ways": ((1, 4, 2, 40, 70), {"causal": False}),
    "both ways, padded": ((2, 2, 1, 70, 70), {"causal": False, "starts": [3, 50]}),
    "one query": ((1, 2, 1, 1, 40), {}),
}
TABLES = {
    "short": {"size": 9},
    "both sides": {"size": 15, "offset": 6},
    "cut": {"size": 100, "offset": 40, "far": 12},
    "long": {"size": 75},
}


def grown(settings: dict[str, Any]) -> dict[str, Any]:
    """Lengths as long as the device's blocks ask for."""
    return {
        name: [x * TIMES for x in value] if isinstance(value, list) else value * TIMES if type(value) is int else value
        for name, value in settings.items()
    }


def compare(
    shape: tuple[int, ...], bias: Bias, dtype: torch.dtype, tolerance: float, starts: Any = None, **settings: Any
) -> None:
    """Forward and every gradient, each error as a share of the largest entry."""
    tensors = [x.to(DEVICE) for x in inputs(*shape)]
    first = None if starts is None else torch.tensor(starts, device=DEVICE)
    ours = [leaf(x, dtype) for x in tensors]
    exact = [leaf(x) for x in ours]
    our_bias = moved(bias, torch.float32, DEVICE)
    exact_bias = moved(our_bias, torch.float64, DEVICE)
    assert serves(ours[0], ours[1], our_bias)
    got = biased_attention(*ours, our_bias, scale=0.2, starts=first, **settings)
    want = reference(*exact, exact_bias, scale=0.2, starts=first, **settings)
    push = torch.randn(want.shape, dtype=dtype).to(DEVICE)
    results = [got, *torch.autograd.grad(got, [*ours, *leaves(our_bias)], push)]
    wanted = [want, *torch.autograd.grad(want, [*exact, *leaves(exact_bias)], push.double())]
    for name, x, y in zip(("out", "query", "key", "value", "a", "b"), results, wanted, strict=False):
        error = (x.double() - y).abs().max() / y.abs().max().clamp(min=1e-3)
        allowed = 4 * tolerance if name in "ab" else tolerance  # sums over all scores, in which errors of rows add up
        assert error < allowed, f"{name}: {float(error.detach()):.1e}"


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_in_float32(case: str, kind: str) -> None:
    (batch, heads, kv_heads, queries, keys), settings = CASES[case]
    shape = batch, heads, kv_heads, queries * TIMES if queries > 1 else 1, keys * TIMES, 32
    table = grown(TABLES["both sides" if "both" in case else "short"]) if kind == "table" else {}
    compare(shape, some_bias(kind, heads, **table), torch.float32, 5e-5, **grown(settings))


@pytest.mark.kernels
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("table", TABLES)
def test_tables(table: str, causal: bool) -> None:
    shape = 1, 2, 1, 45 * TIMES, 75 * TIMES, 32
    compare(shape, some_bias("table", 2, **grown(TABLES[table])), torch.float32, 5e-5, causal=causal)


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "width"), SHORT)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_in_16_bit(kind: str, width: int, dtype: torch.dtype) -> None:
    table = grown(TABLES["short"]) if kind == "table" else {}
    for settings in ({}, {"causal": False}):
        compare((1, 2, 1, 40 * TIMES, 70 * TIMES, width), some_bias(kind, 2, **table), dtype, 3e-2, **settings)


@pytest.mark.kernels
def test_strides_are_followed() -> None:
    """Queries, keys and values as slices of one projection, and a gradient that is one number for all."""
    packed = torch.randn(1, 40, 3, 2, 32, device=DEVICE, requires_grad=True)
    query, key, value = packed.transpose(1, 3).unbind(2)
    bias = moved(some_bias("log", 2), torch.float32, DEVICE)
    out = biased_attention(query, key, value, bias, scale=0.2)
    (got,) = torch.autograd.grad(out.sum(), packed)
    want = reference(query, key, value, bias, scale=0.2)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, torch.autograd.grad(want.sum(), packed)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_a_parameter_that_asks_for_no_gradient_gets_none() -> None:
    query, key, value = (leaf(x.to(DEVICE), torch.float32) for x in inputs(1, 2, 2, 20, 20, 32))
    learned, fixed = torch.ones(2, device=DEVICE, requires_grad=True), torch.ones(2, device=DEVICE)
    for bias, wants in ((Bias("linear", fixed), []), (Bias("log", fixed, learned), [learned])):
        out = biased_attention(query, key, value, bias, scale=0.2)
        for x in torch.autograd.grad(out.sum(), [query, *wants]):
            assert x.isfinite().all()


def loss_of(kind: str, heads: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    tensors = [leaf(x.to(DEVICE), torch.float32) for x in inputs(1, heads, 1, 20, 36, 32)]
    bias = moved(some_bias(kind, heads), torch.float32, DEVICE)

    def loss(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        return biased_attention(query, key, value, Bias(kind, *parameters), scale=0.2).sin().sum()  # type: ignore[arg-type]

    return loss, [*tensors, *leaves(bias)]


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["linear", "table"])
def test_compiles_as_one_graph(kind: str) -> None:
    loss, tensors = loss_of(kind, 2)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for x, y in zip(
        torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.kernels
def test_under_torch_func() -> None:
    loss, tensors = loss_of("log", 2)
    numbers = tuple(range(len(tensors)))
    got = torch.func.grad(loss, argnums=numbers)(*tensors)
    for x, y in zip(got, torch.autograd.grad(loss(*tensors), tensors), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.kernels
def test_no_second_derivative() -> None:
    loss, tensors = loss_of("linear", 2)
    (first,) = torch.autograd.grad(loss(*tensors), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.kernels
@pytest.mark.parametrize("learn", [True, False])
def test_operators_say_what_they_are(learn: bool) -> None:
    query, key, value = (x.detach().float().to(DEVICE) for x in inputs(1, 2, 1, 20, 20, 32))
    a, b = (torch.rand(2, device=DEVICE) + 0.1 for _ in range(2))
    settings = (a, b, None, "log", 0, 0.2, True, None)
    torch.library.opcheck(torch.ops.longspan.biased_forward, (query, key, value, *settings))
    out, lse = torch.ops.longspan.biased_forward(query, key, value, *settings)
    torch.library.opcheck(
        torch.ops.longspan.biased_backward, (query, query, key, value, out, lse, *settings, learn), rtol=1e-4, atol=1e-4
    )


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_length_not_its_square(kind: str) -> None:
    length = 16384
    query, key, value = (leaf(x.cuda(), torch.bfloat16) for x in inputs(1, 4, 4, length, length, 64))
    bias = moved(some_bias(kind, 4, size=129), torch.float32, "cuda")
    biased_attention(
        query, key, value, bias, scale=0.125
    ).sum().backward()  # choosing block sizes takes memory of its own
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    biased_attention(query, key, value, bias, scale=0.125).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * query.numel() * 2
