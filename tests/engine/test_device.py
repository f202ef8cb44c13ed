"""What launches or records does so on the device of its tensors: without two GPUs, which device is entered, and when."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import dense
from longspan.apply import apply
from longspan.engine.decode import single_query as one_query
from longspan.engine.window import fa4
from longspan.memory.streaming import StreamingLLM
from longspan.reading import stream_decoder as decode
from longspan.util.device import on_device


class Entered:
    """In the place of `on_device`: the devices that are entered at the moment."""

    def __init__(self) -> None:
        self.now: list[torch.device] = []

    @contextlib.contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        self.now.append(device)
        yield
        self.now.pop()


def test_only_cuda_devices_are_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = Entered()
    monkeypatch.setattr(torch.cuda, "device", entered)
    with on_device(torch.device("cuda", 1)):
        assert entered.now == [torch.device("cuda", 1)]
    with on_device(torch.device("cpu")):
        assert not entered.now


def test_compiled_code_does_it_by_itself() -> None:
    def within(x: Tensor) -> Tensor:
        with on_device(torch.device("cuda", 1)):
            return x + 1

    compiled = torch.compile(within, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))


def test_steps_of_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the ring is full and after."""
    entered, found = Entered(), []
    monkeypatch.setattr(decode, "on_device", entered)
    model, cache = apply(dense.llama(), StreamingLLM(4, 10)), DynamicCache()
    with torch.no_grad():
        model(dense.tokens(1, 9), past_key_values=cache)
    model.register_forward_hook(lambda *_: found.append(list(entered.now)))
    tokens = decode.StreamDecoder(model, cache).stream(dense.tokens(1, 1))
    for _ in range(9):
        next(tokens)
        assert not entered.now
    assert len(found) == 10 and all(devices and set(devices) == {model.device} for devices in found)


def test_kernels_that_torch_knows_nothing_of(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, found = Entered(), []

    def attend(*tensors: Any, **arguments: Any) -> None:
        found.append(list(entered.now))

    def flash(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, None]:
        found.append(list(entered.now))
        return q, None

    monkeypatch.setattr(one_query, "on_device", entered)
    monkeypatch.setitem(sys.modules, "longspan.engine.decode.kernels", SimpleNamespace(attend={(1, 1): attend}))
    monkeypatch.setattr(fa4, "on_device", entered)
    monkeypatch.setattr(fa4, "_function", lambda: flash)
    query = torch.zeros(1, 1, 1, 16)
    one_query.one_query_attention(query, query, query, 1.0)
    fa4.attention(query, query, query, window=1, scale=1.0)
    assert found == [[query.device], [query.device]]
