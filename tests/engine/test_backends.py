"""Every backend against the definition, and which backend is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tiny
from longspan.attention.window import Window
from longspan.engine import backends
from longspan.engine.backends import choose, use_backend
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import reference_attention
from longspan.engine.kernels import INTERPRETED
from longspan.engine.patterns import attend
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.lm.base import Full, Pattern
from longspan.util.errors import NotSupported, SpecError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def call(length: int = 300, heads: tuple[int, int] = (4, 2), width: int = 32, device: str = "cpu") -> AttentionCall:
    shapes = (heads[0], length), (heads[1], length), (heads[1], length)
    return AttentionCall(*(torch.randn(2, *shape, width, device=device) for shape in shapes), 0.2)


def wanted(pattern: Pattern, call: AttentionCall, causal: bool) -> Tensor:
    length = call.query.shape[2]
    number = torch.arange(length, device=call.query.device)[None]
    seen = pattern.mask(number, number, AttentionShape(4, length, 0, causal))
    if causal:
        seen = seen & (number[:, None, None] <= number[:, None, :, None])
    if call.padding is not None:
        seen = seen & call.padding[:, None, None]
    return reference_attention(call.query, call.key, call.value, seen, call.scale)


@torch.no_grad()
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [Window(40), Window(130, 3), Window(20, 200), Full()], ids=lambda p: p.spec)
def test_flex_is_the_definition(pattern: Pattern, causal: bool, device: str) -> None:
    plain = call(device=device)
    padded = torch.ones(2, 300, dtype=torch.bool, device=device)
    padded[0, :33] = padded[1, 251:] = False
    with use_backend("flex"):
        got = attend(pattern, plain, AttentionShape(4, 300, 0, causal))
        torch.testing.assert_close(got, wanted(pattern, plain, causal), rtol=1e-4, atol=1e-4)
        got = attend(pattern, replace(plain, padding=padded), AttentionShape(4, 300, 0, causal))
    right = replace(call(267), **{n: getattr(plain, n)[:1, :, 33:] for n in ("query", "key", "value")}, scale=0.2)
    torch.testing.assert_close(got[:1, :, 33:], wanted(pattern, right, causal), rtol=1e-4, atol=1e-4)
    left = replace(call(251), **{n: getattr(plain, n)[1:, :, :251] for n in ("query", "key", "value")}, scale=0.2)
    torch.testing.assert_close(got[1:, :, :251], wanted(pattern, left, causal), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pattern", [Window(40), Window(130, 3), Full()], ids=lambda p: p.spec)
def test_flex_trains(pattern: Pattern, causal: bool) -> None:
    """The tables from keys to queries, on a GPU."""
    here = call(700, width=64, device="cuda")
    tensors = [x.requires_grad_() for x in (here.query, here.key, here.value)]
    with use_backend("flex"):
        out = attend(pattern, here, AttentionShape(4, 700, 0, causal))
    push = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, push)
    exact = torch.autograd.grad(wanted(pattern, here, causal), tensors, push)
    for x, y in zip(got, exact, strict=True):
        assert (x - y).abs().max() < 2e-2 * y.abs().max()


def test_what_is_chosen_and_why() -> None:
    here, grid = call(), AttentionShape(4, 300, 0, True)
    choice = choose(Window(40, 3), here, grid)
    if INTERPRETED:
        assert choice.backend == "kernel" and not choice.why
        return
    assert (
        choice.backend == "masks" and "kernel: " in choice.why and "flex: the device is not a CUDA device" in choice.why
    )
    with use_backend("masks"):
        assert choose(Window(40), here, grid).why == "requested"
    with pytest.raises(NotSupported, match="no backward on a CPU"), use_backend("flex"):
        choose(Window(40), replace(here, query=here.query.requires_grad_()), grid)
    with pytest.raises(NotSupported, match="windows that look back"), use_backend("kernel"):
        choose(Window(40), here, replace(grid, causal=False))
    with pytest.raises(NotSupported, match="position scheme"), use_backend("flex"):
        choose(Window(40), replace(here, bias=lambda d: d.float()[None]), grid)
    with pytest.raises(SpecError), use_backend("fast"):
        pass
    assert choose(Window(40), here, grid).backend == "masks"


@pytest.mark.cuda
def test_what_is_chosen_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    here, grid = call(device="cuda"), AttentionShape(4, 300, 0, True)
    assert choose(Window(40, 3), here, grid).backend == "kernel"
    assert choose(Window(40, 3), here, replace(grid, causal=False)).backend == "flex"
    assert choose(Window(40, 3), replace(here, bias=lambda d: d.float()[None]), grid).backend == "masks"
    monkeypatch.setattr(backends, "MOST_SHAPES", 0)
    monkeypatch.setattr(backends, "_shapes", set())
    assert "compiled 0 shapes" in choose(Window(40), here, replace(grid, causal=False)).why


def test_a_shape_counts_once_for_each_device() -> None:
    """A model over several GPUs has FlexAttention compiled on each."""
    grid = AttentionShape(4, 300, 0, True)
    blocks = Window(40).blocks(grid, 128, torch.device("cpu"))
    assert (
        len(
            {backends._compiled_for(Window(40), call(device=device), grid, blocks) for device in ("cpu", "meta", "cpu")}
        )
        == 2
    )


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """FlexAttention goes through torch.compile, with what it traced run as it is; a list with an entry for each compilation."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(len(inputs))
        return graph.forward

    backends.forget_compiled()
    monkeypatch.setattr(backends, "_runner", lambda device: backends._compiled(backend))
    yield made
    backends.forget_compiled()


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_texts_of_about_one_length_share_a_kernel(causal: bool, compiled: list[int]) -> None:
    """Encoders read texts of all lengths, with or without padding; windows of other sizes are other numbers in one kernel."""
    for length in (257, 300, 350, 383):
        plain, grid = call(length, width=8), AttentionShape(4, length, 0, causal)
        padded = torch.ones(2, length, dtype=torch.bool)
        padded[0, -length // 3 :] = False
        for pattern in (Window(40, 3), Window(150)):
            with use_backend("flex"):
                got = attend(pattern, plain, grid)
                rows = attend(pattern, replace(plain, padding=padded), grid)
            torch.testing.assert_close(got, wanted(pattern, plain, causal), rtol=1e-4, atol=1e-4)
            exact = wanted(pattern, replace(plain, padding=padded), causal)
            real = padded[:, None, :, None]
            torch.testing.assert_close(rows * real, exact * real, rtol=1e-4, atol=1e-4)
    assert len(compiled) <= len(backends._shapes) * 2 <= (4 if causal else 8)


@torch.no_grad()
@pytest.mark.parametrize("own_limit", {False, backends._LIMIT_OF_ITS_OWN})
def test_more_shapes_than_torch_compiles_by_itself(
    own_limit: bool, compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past its limit, which is eight, FlexAttention would hold every score."""
    monkeypatch.setattr(backends, "_LIMIT_OF_ITS_OWN", own_limit)
    monkeypatch.setattr(backends, "_over_blocks", lambda query: query + 1)
    run = backends._runner(torch.device("cpu"))
    for length in range(2, 14):
        assert torch.equal(run(torch.ones(length)), torch.full((length,), 2.0))
    assert len(compiled) == 12


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [True, False])
def test_texts_of_many_lengths_on_cuda(causal: bool) -> None:
    """Forward and backward, none refused."""
    backends.forget_compiled()
    for length in (257, 300, 450, 700, 770, 1000, 1400, 1500, 1900, 2500, 2600, 3500):
        here = call(length, width=64, device="cuda")
        tensors = [x.requires_grad_() for x in (here.query, here.key, here.value)]
        outs = []
        for backend in ("flex", "masks"):
            with use_backend(backend):
                outs.append(attend(Window(100, 3), here, AttentionShape(4, length, 0, causal)))
        push = torch.randn_like(outs[0])
        got, exact = (torch.autograd.grad(out, tensors, push) for out in outs)
        for x, y in zip([outs[0], *got], [outs[1], *exact], strict=True):
            assert (x - y).abs().max() < 2e-2 * y.abs().max()
    assert len(backends._shapes) <= 8


@torch.no_grad()
def test_a_whole_model_gives_the_same_on_every_backend() -> None:
    config = LongspanConfig(
        **tiny.sizes(96, 128, 64, 2, 4, 2),
        max_position_embeddings=64,
        attention="window:size=20,sinks=2",
    )
    torch.manual_seed(1)
    model, ids = LongspanForCausalLM(config).eval(), torch.randint(1, 96, (2, 150))
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    results = []
    for backend in ("masks", "flex", "kernel") if INTERPRETED else ("masks", "flex"):
        cache = DynamicCache()
        with use_backend(backend):
            results.append(model(ids, attention_mask=mask).logits * mask[..., None])
            parts = [model(part, past_key_values=cache).logits for part in ids.split((70, 1, 1, 40, 38), dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-3, atol=1e-4)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)


def test_the_earlier_name_warns() -> None:
    here = call(device="cpu")
    with pytest.warns(DeprecationWarning, match="use_backend"):
        requirement = backends.through("masks")
    with requirement:
        shape = AttentionShape(4, here.query.shape[2], 0, True)
        assert choose(Window(40), here, shape) == backends.Choice("masks", "requested")
