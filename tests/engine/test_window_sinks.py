"""The kernels for a window with sinks against the formula in float64: on CUDA, or on a CPU with Triton's interpreter
(TRITON_INTERPRET=1), where shapes are small and so are the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.attention.window import Window
from longspan.engine import backends
from longspan.engine.backends import choose
from longspan.engine.biased.attention import serves
from longspan.engine.biased.bias import Bias
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import reference_attention, with_zero_key
from longspan.engine.kernels import INTERPRETED
from longspan.engine.patterns import attend, masked_attention
from longspan.engine.window import window_sinks
from longspan.engine.window.window_sinks import attention, described, refusal
from longspan.util.errors import SpecError

DEVICE = "cpu" if INTERPRETED else "cuda"
TIMES = 1 if INTERPRETED else 8
"""Blocks are 16 or 32 wide in the interpreter and up to 128 on a GPU: lengths grow with them."""
CASES = {  # batch, heads, key heads, queries, keys, window, sinks
    "square": (1, 2, 1, 64, 64, 20, 4),
    "ragged, grouped": (2, 4, 2, 75, 75, 17, 3),
    "no sinks": (1, 2, 2, 75, 75, 33, 0),
    "many sinks": (1, 2, 1, 90, 90, 10, 37),
    "window of one": (1, 2, 2, 50, 50, 1, 2),
    "all is seen": (1, 2, 1, 45, 45, 45, 4),
    "last queries": (2, 2, 1, 37, 80, 21, 5),
    "one query": (1, 2, 1, 1, 70, 16, 4),
    "blocks' edges": (1, 1, 1, 96, 96, 32, 16),
}
WIDTHS = [(torch.float16, 64), (torch.float16, 128)]
if not INTERPRETED:
    WIDTHS += [(torch.bfloat16, 64), (torch.bfloat16, 128)]


def visible(queries: int, keys: int, window: int, sinks: int) -> Tensor:
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (distance >= 0) & ((distance < window) | (torch.arange(keys) < sinks))


def inputs(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, kv_heads, queries, keys = shape
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(batch, *size, width).to(DEVICE, dtype).requires_grad_() for size in sizes]


def compare(case: tuple[int, ...], width: int, dtype: torch.dtype, tolerance: float, *, zero_key: bool = False) -> None:
    """Forward and every gradient, each error as a share of the largest entry."""
    *shape, window, sinks = case
    ours = inputs(tuple(shape), width, dtype)
    exact = [x.detach().double().requires_grad_() for x in ours]
    assert refusal(*ours) is None
    got = attention(*ours, window=window, sinks=sinks, scale=0.2, zero_key=zero_key)
    query, *pair, mask = *exact, visible(*shape[3:], window, sinks).to(DEVICE)
    want = reference_attention(query, *(with_zero_key(*pair, mask) if zero_key else (*pair, mask)), 0.2)
    push = torch.randn(want.shape).to(DEVICE, dtype)
    results = [got, *torch.autograd.grad(got, ours, push)]
    for name, x, y in zip(
        ("out", "query", "key", "value"), results, [want, *torch.autograd.grad(want, exact, push.double())], strict=True
    ):
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error < tolerance, f"{name}: {float(error.detach()):.1e}"


def grown(case: str) -> tuple[int, ...]:
    batch, heads, kv_heads, queries, keys, window, sinks = CASES[case]
    return batch, heads, kv_heads, queries if queries == 1 else queries * TIMES, keys * TIMES, window * TIMES, sinks


@pytest.mark.kernels
def test_wide_heads_are_read_through_descriptors_where_memory_allows() -> None:
    query, key, value = (x.detach() for x in inputs((1, 2, 1, 60, 60), 128, torch.float16))
    assert described(query, key, value) == (INTERPRETED or torch.cuda.get_device_capability() >= (9, 0))
    odd = torch.cat((key[..., :1], key), dim=-1)[..., 1:]  # begins between two of the places that a descriptor can
    assert not described(query, odd, value)
    settings = {"window": 20, "sinks": 3, "scale": 0.2}
    torch.testing.assert_close(
        attention(query, odd, value, **settings), attention(query, key, value, **settings), rtol=1e-2, atol=1e-2
    )


@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES)
def test_in_float32(case: str) -> None:
    compare(grown(case), 32, torch.float32, 5e-5)


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
@pytest.mark.parametrize("case", ["ragged, grouped", "no sinks", "many sinks", "last queries"])
def test_in_16_bit(case: str, dtype: torch.dtype, width: int) -> None:
    compare(grown(case), width, dtype, 2e-2)


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "width", "tolerance"), [(torch.float32, 32, 5e-5), (torch.float16, 128, 2e-2)])
@pytest.mark.parametrize("case", ["ragged, grouped", "no sinks", "last queries"])
def test_a_key_of_zeros(case: str, dtype: torch.dtype, width: int, tolerance: float) -> None:
    compare(grown(case), width, dtype, tolerance, zero_key=True)


@pytest.mark.kernels
def test_windows_of_a_model_with_a_zero_sink_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (x.detach() for x in inputs((1, 2, 1, 40, 40), 32, torch.float32))
    call, grid = AttentionCall(query, key, value, 0.2, zero_key=True), AttentionShape(2, 40, 0, True)
    assert choose(Window(9, 2), call, grid).backend == "kernel"
    want = masked_attention(Window(9, 2), call, grid)
    monkeypatch.setattr(backends, "masked_attention", None)
    torch.testing.assert_close(attend(Window(9, 2), call, grid), want, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_sinks_hear_from_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients to the sinks, added up in several parts."""
    monkeypatch.setattr(window_sinks, "LEAST_PART", 64)
    monkeypatch.setattr(window_sinks, "MOST_PARTS", 3)
    compare((1, 2, 1, 230, 230, 12, 5), 32, torch.float32, 5e-5)


@pytest.mark.kernels
def test_more_rows_than_a_launch_has() -> None:
    x = torch.zeros(1, 1, 1, 32, device=DEVICE).expand(2**14, 4, 1, 32)
    assert refusal(x[1:], x[1:], x[1:]) is None
    assert "65,535" in str(refusal(x, x, x)) and not serves(x, x, Bias()) and serves(x[1:], x[1:], Bias())


@pytest.mark.kernels
def test_strides_are_followed() -> None:
    packed = torch.randn(1, 40, 3, 2, 32, device=DEVICE, requires_grad=True)
    query, key, value = packed.transpose(1, 3).unbind(2)
    out = attention(query, key, value, window=7, sinks=2, scale=0.2)
    want = reference_attention(query, key, value, visible(40, 40, 7, 2).to(DEVICE), 0.2)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    got, wanted = (torch.autograd.grad(x.sum(), packed)[0] for x in (out, want))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_operators_compile_and_say_what_they_are() -> None:
    tensors = [x.detach() for x in inputs((1, 2, 1, 20, 20), 32, torch.float32)]
    torch.library.opcheck(torch.ops.longspan.windowed_forward, (*tensors, 7, 2, True, 0.2))
    out, lse = torch.ops.longspan.windowed_forward(*tensors, 7, 2, True, 0.2)
    torch.library.opcheck(
        torch.ops.longspan.windowed_backward, (out, *tensors, out, lse, 7, 2, 0.2), rtol=1e-4, atol=1e-4
    )

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, window=7, sinks=2, scale=0.2).sin().sum()

    leaves = [x.requires_grad_() for x in tensors]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
    )


@pytest.mark.cuda
def test_against_its_definition_at_length() -> None:
    """Also at the sizes that a model has."""
    query, key, value = inputs((1, 16, 4, 2**17, 2**17), 128, torch.bfloat16)
    out = attention(query, key, value, window=1024, sinks=4, scale=0.1)
    for start in (0, 1000, 65536, 2**17 - 128):
        rows = slice(start, start + 128)
        seen = Window(1024, 4).mask(torch.arange(start, start + 128)[None], torch.arange(2**17)[None], None)[0, 0]
        seen = seen & (torch.arange(2**17) <= torch.arange(start, start + 128)[:, None])
        near = seen.any(0).nonzero()[:, 0].cuda()
        want = reference_attention(
            query[:, :, rows].double(), key[:, :, near].double(), value[:, :, near].double(), seen.cuda()[:, near], 0.1
        )
        assert (out[:, :, rows].double() - want).abs().max() < 2e-2 * want.abs().max()


def test_what_cannot_be() -> None:
    x = torch.randn(1, 2, 8, 32)
    for settings in ({"window": 0}, {"sinks": -1}, {"scale": 0.0}):
        with pytest.raises(SpecError):
            attention(x, x, x, **{"window": 4, "sinks": 1, "scale": 1.0, **settings})
    assert refusal(x.double(), x.double(), x.double())
    assert refusal(x, x, x[..., :16])
