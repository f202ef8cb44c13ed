"""Sinks added to a window against the formula in float64: on CUDA, or on a CPU with Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.engine.core import reference_attention
from longspan.engine.kernels import INTERPRETED
from longspan.engine.window.sink_correction import with_sinks

pytestmark = pytest.mark.kernels
DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = {  # batch, heads, key heads, queries, keys, window, sinks
    "square": (1, 2, 2, 70, 70, 20, 4),
    "grouped": (2, 4, 2, 53, 53, 17, 3),
    "many sinks": (1, 2, 1, 75, 75, 9, 37),
    "more sinks than keys": (1, 2, 1, 20, 20, 3, 50),
    "last queries": (2, 2, 1, 25, 60, 12, 5),
    "all is near": (1, 2, 1, 30, 30, 30, 4),
}


def near_keys(queries: int, keys: int, window: int) -> Tensor:
    back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return ((back >= 0) & (back < window)).to(DEVICE)


def over_window(window: int, scale: float):  # type: ignore[no-untyped-def]
    """What another library gives: the result and its log-sum-exp, of (B, T, H, D) as of a view."""

    def near(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        seen = near_keys(query.shape[2], key.shape[2], window)
        wide = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = (query.float() @ wide.float().mT * scale).masked_fill(~seen, float("-inf"))
        out = reference_attention(query, key, value, seen, scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), scores.logsumexp(-1).float()

    return near


def inputs(case: str, width: int, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, kv_heads, queries, keys, *_ = CASES[case]
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(batch, *size, width).to(DEVICE, dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize(("dtype", "width", "tolerance"), [(torch.float32, 32, 5e-5), (torch.float16, 128, 1e-2)])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_the_formula(case: str, dtype: torch.dtype, width: int, tolerance: float) -> None:
    ours = inputs(case, width, dtype)
    exact = [x.detach().double().requires_grad_() for x in ours]
    *_, queries, keys, window, sinks = CASES[case]
    got = with_sinks(over_window(window, 0.2), *ours, window=window, sinks=sinks, scale=0.2)
    far = (torch.arange(keys) < sinks) & (torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None])
    want = reference_attention(*exact, near_keys(queries, keys, window) | far.to(DEVICE), 0.2)
    push = torch.randn(want.shape).to(DEVICE, dtype)
    for _ in range(2):  # twice, as a graph that is kept may be asked
        grads = torch.autograd.grad(got, ours, push, retain_graph=True)
        wanted = torch.autograd.grad(want, exact, push.double(), retain_graph=True)
        for x, y in zip((got, *grads), (want, *wanted), strict=True):
            assert (x.double() - y).abs().max() < tolerance * y.abs().max()


def test_without_gradients_no_graph_is_kept() -> None:
    query, key, value = (x.detach() for x in inputs("square", 32, torch.float32))
    asked = []

    def near(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(any(x.requires_grad for x in tensors))
        return over_window(20, 0.2)(*tensors)

    with_sinks(near, query, key, value, window=20, sinks=4, scale=0.2)
    with torch.no_grad():
        with_sinks(near, query.requires_grad_(), key, value, window=20, sinks=4, scale=0.2)
    out = with_sinks(near, query, key, value, window=20, sinks=4, scale=0.2)
    assert asked == [False, False, True]
    (grad,) = torch.autograd.grad(out.sum(), query)
    assert grad.shape == query.shape


def test_what_is_made_again_is_neither_kept_nor_made_twice() -> None:
    """A layer that is run again in the backward pass keeps nothing of the window's, and runs once more, not twice."""
    ours = inputs("square", 32, torch.float32)
    made: list[weakref.ref] = []

    class Window(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
            out, lse = over_window(20, 0.2)(*tensors)
            ctx.save_for_backward(*tensors, out)
            made.append(weakref.ref(out))
            return out, lse

        @staticmethod
        def backward(ctx, *pushes):  # type: ignore[no-untyped-def]
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
                return torch.autograd.grad(over_window(20, 0.2)(*leaves), leaves, pushes)

    def layer(*tensors: Tensor) -> Tensor:
        return with_sinks(Window.apply, *(x * 1.5 for x in tensors), window=20, sinks=4, scale=0.2).sin()

    want = torch.autograd.grad(layer(*ours).sum(), ours)
    assert made.pop()() is None
    out = checkpoint(layer, *ours, use_reentrant=False)
    assert [ref() for ref in made] == [None]
    got = torch.autograd.grad(out.sum(), ours)
    assert [ref() for ref in made] == [None, None]
    torch.testing.assert_close(got, want)
