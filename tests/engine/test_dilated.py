"""The kernels for dilated attention against their definition in float64: on CUDA, or on a CPU with Triton's interpreter
(TRITON_INTERPRET=1), where shapes are small and so are the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.attention.longnet import LongNet
from longspan.engine.call import AttentionShape
from longspan.engine.core import expand_heads
from longspan.engine.dilated.attention import dilated_attention, refusal
from longspan.engine.kernels import INTERPRETED
from longspan.util.errors import SpecError

DEVICE = "cpu" if INTERPRETED else "cuda"
TIMES = 1 if INTERPRETED else 16
CASES = {  # batch, heads, key heads, tokens, patterns, causal, ends, zero key
    "one pattern": (1, 2, 2, 64, [(16, 1)], True, None, False),
    "the paper's form": (1, 4, 2, 96, [(16, 1), (32, 2), (64, 4)], True, None, False),
    "ragged ends": (2, 3, 1, 75, [(20, 1), (50, 3)], True, None, False),
    "longer than the text": (1, 2, 1, 40, [(64, 1), (128, 2)], True, None, False),
    "both ways": (2, 4, 2, 75, [(20, 1), (60, 4)], False, None, False),
    "both ways, padded": (2, 4, 2, 75, [(20, 1), (60, 4)], False, [75, 33], False),
    "zero key": (1, 4, 4, 60, [(16, 1), (32, 2)], True, None, True),
    "a step that leaves a tail of nothing": (1, 4, 2, 34, [(16, 1), (32, 4)], True, None, False),
}
WIDTHS = [(torch.float16, 64)] if INTERPRETED else [(torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 64)]


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: list[tuple[int, int]],
    causal: bool,
    ends: Tensor | None,
    zero: bool,
) -> Tensor:
    """A softmax in which a key of m patterns counts m times."""
    heads, text = query.shape[1:3]
    spec = LongNet("/".join(str(w) for w, _ in patterns), "/".join(str(r) for _, r in patterns))
    places = torch.arange(text, device=query.device)
    counts = spec.multiplicity(places[None], places[None], AttentionShape(heads, text, 0, causal)).to(query.dtype)
    if causal:
        counts = counts.tril()
    if ends is not None:
        real = (places < ends[:, None]).to(counts.dtype)
        counts = counts * real[:, None, None] * real[:, None, :, None]
    key, value = (expand_heads(x, heads) for x in (key, value))
    weights = counts * torch.exp(query @ key.mT * 0.2)
    total = weights.sum(-1, keepdim=True) + int(zero)
    return weights @ value / total.where(total > 0, 1.0)


def compare(case: str, width: int, dtype: torch.dtype, tolerance: float) -> None:
    """Forward and every gradient, each error as a share of the largest entry."""
    batch, heads, kv_heads, text, patterns, causal, ends, zero = CASES[case]
    text, patterns = text * TIMES, [(w * TIMES, r) for w, r in patterns]
    length = None if ends is None else torch.tensor(ends, device=DEVICE) * TIMES
    ours = [torch.randn(batch, h, text, width).to(DEVICE, dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    assert refusal(*ours) is None
    got = dilated_attention(*ours, patterns, causal=causal, scale=0.2, ends=length, zero_key=zero)
    want = definition(*exact, patterns, causal, length, zero)
    push = torch.randn(want.shape).to(DEVICE, dtype)
    results = [got, *torch.autograd.grad(got, ours, push)]
    wanted = [want, *torch.autograd.grad(want, exact, push.double())]
    for name, x, y in zip(("out", "query", "key", "value"), results, wanted, strict=True):
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error < tolerance, f"{name}: {float(error.detach()):.1e}"


@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES)
def test_in_float32(case: str) -> None:
    compare(case, 32, torch.float32, 5e-5)


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
@pytest.mark.parametrize("case", ["the paper's form", "both ways, padded"])
def test_in_16_bit(case: str, dtype: torch.dtype, width: int) -> None:
    compare(case, width, dtype, 2e-2)


@pytest.mark.kernels
def test_strides_are_followed() -> None:
    packed = torch.randn(1, 40, 3, 2, 32, device=DEVICE, requires_grad=True)
    query, key, value = packed.transpose(1, 3).unbind(2)
    out = dilated_attention(query, key, value, [(8, 1), (16, 2)], causal=True, scale=0.2)
    want = definition(query, key, value, [(8, 1), (16, 2)], True, None, False)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    got, wanted = (torch.autograd.grad(x.sum(), packed)[0] for x in (out, want))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_rows_of_a_tile_may_lie_far_apart() -> None:
    """Heads beside one another and a large dilation: an index past 2³¹ within one tile. Little of the memory is touched."""
    tile, row, width = 32 if INTERPRETED else 128, 4096, 32
    step = 2**31 // ((tile - 1) * row) + 1
    text = (tile - 1) * step + 1
    line = torch.empty((text - 1) * row + 3 * width, dtype=torch.float16, device=DEVICE)
    ours = [line[n * width :].as_strided((1, 1, text, width), (0, 0, row, 1)) for n in range(3)]
    for x in ours:
        x[:, :, ::step] = torch.randn(tile, width)
    query, key, value = (x[:, :, ::step].double().requires_grad_() for x in ours)
    settings = [text, step], True
    out, lse = torch.ops.longspan.dilated_forward(*ours, None, *settings, False, 0.2)
    push = torch.zeros_like(out)
    push[:, :, ::step] = torch.randn(tile, width)
    out = out.index_fill_(2, (torch.arange(text, device=DEVICE) % step > 0).nonzero()[:, 0], 0)
    grads = torch.ops.longspan.dilated_backward(push, *ours, out, lse, None, *settings, 0.2)
    want = definition(query, key, value, [(tile, 1)], True, None, False)
    wanted = torch.autograd.grad(want, (query, key, value), push[:, :, ::step].double())
    for x, y in zip((out, *grads), (want, *wanted), strict=True):
        assert (x[:, :, ::step].double() - y).abs().max() < 2e-2 * y.abs().max()


@pytest.mark.kernels
def test_operators_say_what_they_are() -> None:
    tensors = [torch.randn(1, h, 20, 32, device=DEVICE) for h in (2, 1, 1)]
    settings = [16, 2, 8, 1]
    torch.library.opcheck(torch.ops.longspan.dilated_forward, (*tensors, None, settings, True, False, 0.2))
    out, lse = torch.ops.longspan.dilated_forward(*tensors, None, settings, True, False, 0.2)
    given = (out, *tensors, out, lse, None, settings, True, 0.2)
    torch.library.opcheck(torch.ops.longspan.dilated_backward, given, rtol=1e-4, atol=1e-4)


def test_what_cannot_be() -> None:
    x = torch.randn(1, 2, 8, 32)
    for patterns in ([], [(8, 2)], [(8, 1), (4, 5)]):
        with pytest.raises(SpecError):
            dilated_attention(x, x, x, patterns, causal=True, scale=1.0)
    with pytest.raises(SpecError):
        dilated_attention(x, x[:, :, :4], x[:, :, :4], [(8, 1)], causal=True, scale=1.0)
