"""What FlashAttention 4 is asked for, and when; on a GPU where it is installed, what it answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.attention.window import Window
from longspan.engine import backends
from longspan.engine.backends import choose, use_backend
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import reference_attention
from longspan.engine.window import fa4
from longspan.util.errors import NotSupported

CASES = {  # batch, heads, key heads, queries, keys, window
    "square": (1, 2, 2, 200, 200, 30),
    "grouped": (2, 4, 2, 333, 333, 100),
    "last queries": (1, 4, 1, 70, 300, 50),
    "window of one": (1, 2, 2, 40, 40, 1),
    "all is seen": (1, 2, 1, 90, 90, 200),
}
SINKS = {  # the same, and sinks
    "square": (1, 2, 2, 700, 700, 130, 4),
    "grouped": (2, 4, 2, 333, 333, 30, 20),
    "last queries": (1, 4, 1, 270, 600, 50, 4),
    "sinks of two blocks": (1, 2, 2, 640, 640, 100, 150),
    "one block": (1, 2, 1, 90, 90, 20, 4),
}


def inputs(case: str, device: str, dtype: torch.dtype, cases: dict = CASES) -> list[Tensor]:
    batch, heads, kv_heads, queries, keys = cases[case][:5]
    sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(batch, *size, 64).to(device, dtype).requires_grad_() for size in sizes]


def wanted(tensors: list[Tensor], window: int, sinks: int = 0) -> Tensor:
    queries, keys = tensors[0].shape[2], tensors[1].shape[2]
    key = torch.arange(keys)
    back = torch.arange(keys - queries, keys)[:, None] - key
    return reference_attention(*tensors, ((back >= 0) & ((back < window) | (key < sinks))).to(tensors[0].device), 0.2)


def documented(q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> tuple[Tensor, Tensor | None]:
    """FlashAttention as its documentation has it: (B, T, H, D), a query sees the keys at `window_size` (left, right) of its own
    place, the last query stands at the last key."""
    left, right = asked["window_size"]
    assert asked["causal"] and right == 0 and not asked["deterministic"]
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    place = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    keys = torch.arange(key.shape[2])
    seen = (keys <= place + right) & (keys >= place - left)
    return reference_attention(query, key, value, seen, asked["softmax_scale"]).transpose(1, 2), None


def test_sinks_are_added_to_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def function(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        asked.update(settings)
        return q, q[..., 0].transpose(1, 2).float()

    def with_sinks(near: Any, *tensors: Tensor, **settings: Any) -> Tensor:
        assert settings == {"window": 30, "sinks": 4, "scale": 0.2}
        out, lse = near(*tensors)
        assert torch.equal(out, tensors[0]) and torch.equal(lse, tensors[0][..., 0])
        return out

    monkeypatch.setattr(fa4, "_function", lambda: function)
    monkeypatch.setattr(fa4, "with_sinks", with_sinks)
    fa4.attention(*inputs("square", "cpu", torch.float32), window=30, sinks=4, scale=0.2)
    assert asked["return_lse"] and asked["window_size"] == (29, 0) and asked["causal"] and asked["softmax_scale"] == 0.2


def test_without_gradients_of_its_sums_there_are_no_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first versions that gave log-sum-exps (before 4.0.0b5) left them out of the graph, without a word."""

    def function(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        return q * 1, q.detach()[..., 0].transpose(1, 2).float()

    monkeypatch.setattr(fa4, "_function", lambda: function)
    monkeypatch.setattr(fa4, "with_sinks", lambda near, *tensors, **settings: near(*tensors)[0])
    tensors = inputs("square", "cpu", torch.float32)
    with pytest.raises(NotSupported, match="--upgrade"):
        fa4.attention(*tensors, window=30, sinks=4, scale=0.2)
    with torch.no_grad():
        fa4.attention(*tensors, window=30, sinks=4, scale=0.2)
    fa4.attention(*tensors, window=30, scale=0.2)


@pytest.mark.parametrize("case", CASES)
def test_it_is_asked_for_the_window(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4, "_function", lambda: documented)
    tensors = inputs(case, "cpu", torch.float64)
    got = fa4.attention(*tensors, window=CASES[case][-1], scale=0.2)
    torch.testing.assert_close(got, wanted(tensors, CASES[case][-1]))


def test_windows_go_there_where_it_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs("square", "cpu", torch.float32)
    here, grid = AttentionCall(*tensors, 0.2), AttentionShape(2, 200, 0, True)
    assert "fa4: the device is not a CUDA device" in choose(Window(30), here, grid).why
    monkeypatch.setattr(fa4, "refusal", lambda *tensors, sinks: "no sinks" if sinks else None)
    monkeypatch.setattr(fa4, "_function", lambda: documented)
    assert choose(Window(30), here, grid) == backends.Choice("fa4")
    torch.testing.assert_close(backends.run(Window(30), here, grid), wanted(tensors, 30))
    assert choose(Window(30, 2), here, grid).backend != "fa4"
    with pytest.raises(NotSupported, match="no sinks"), use_backend("fa4"):
        choose(Window(30, 2), here, grid)
    assert choose(Window(30), here, AttentionShape(2, 200, 0, False)).backend != "fa4"


@pytest.mark.parametrize("missing", ["flash_attn.cute", "cutlass.cute"])
def test_without_what_compiles_it_it_is_not_there(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    fa4.installed.cache_clear()
    try:
        assert not fa4.installed()
    finally:
        fa4.installed.cache_clear()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, *(f"{case}, sinks" for case in SINKS)])
def test_forward_and_gradients_equal_the_formula(case: str, dtype: torch.dtype) -> None:
    case, with_sinks, _ = case.partition(", sinks")
    cases = SINKS if with_sinks else CASES
    ours, (window, sinks) = inputs(case, "cuda", dtype, cases), (*cases[case][5:], 0)[:2]
    if reason := fa4.refusal(*ours, sinks=sinks):
        pytest.skip(reason)
    exact = [x.detach().double().requires_grad_() for x in ours]
    got, want = fa4.attention(*ours, window=window, sinks=sinks, scale=0.2), wanted(exact, window, sinks)
    push = torch.randn_like(got)
    grads = torch.autograd.grad(got, ours, push), torch.autograd.grad(want, exact, push.double())
    for x, y in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        assert (x.double() - y).abs().max() < 2e-2 * y.abs().max() + 1e-5  # one key alone has no gradient at all
