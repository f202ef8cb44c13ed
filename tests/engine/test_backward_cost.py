"""The backward pass of attention in blocks: linear in the length where the forward pass is, counted in bytes that are written."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import longspan as ls
import tiny
from growth import Written, backward_growth
from longspan.attention import trained
from longspan.attention.bigbird import BigBird
from longspan.attention.local import Local, Overlap
from longspan.attention.longformer.pattern import Longformer
from longspan.attention.longnet import LongNet
from longspan.attention.window import Window
from longspan.engine import masks
from longspan.engine.blocks import gathered as blocks
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import reference_mix
from longspan.engine.joint import by_row
from longspan.engine.masks import masked_attention
from longspan.engine.patterns import attend
from longspan.engine.retrieval import grouped
from longspan.engine.retrieval.grouped import grouped_attention, grouped_weights
from longspan.engine.window import banded
from longspan.lm import attention as scheme_attention
from longspan.lm.base import Pattern
from longspan.memory import streaming
from longspan.positions import near_far, spans
from longspan.positions.kerple import Kerple
from longspan.positions.scheme import PositionEncoding, Shape
from longspan.positions.t5_bias import T5Bias
from longspan.positions.xl import XL

SHAPE = Shape(layers=1, hidden=8, heads=2, head_dim=4, window=64, causal=True)
LENGTH = 1024


def call(length: int, place: PositionEncoding | None = None, dtype: torch.dtype = torch.float32) -> AttentionCall:
    shapes = (2, length, 4), (1, length, 4), (1, length, 4)
    query, key, value = (torch.randn(1, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return AttentionCall(query, key, value, 0.5, bias=None if place is None else place.bias)


def drawn(scheme: Kerple | T5Bias) -> PositionEncoding:
    place = scheme.build(SHAPE)
    for parameter in place.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.0)
    return place


def query_scores(length: int) -> Callable[[slice, Tensor], Tensor]:
    query = torch.randn(1, 2, length, 4, requires_grad=True)
    asking = scheme_attention.query_scores(XL().build(SHAPE), query, torch.arange(length)[None], 0)
    assert asking is not None
    return asking


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scheme", [None, Kerple(), T5Bias()], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [Window(32), Window(32, 4), Local(32), Overlap(32), LongNet("32/64", "1/2"), Longformer(32, 1, 2)],
    ids=lambda p: p.spec,
)
def test_patterns(pattern: Pattern, scheme: Kerple | T5Bias | None, causal: bool) -> None:
    place = None if scheme is None else drawn(scheme)
    growth = backward_growth(lambda n: attend(pattern, call(n, place), AttentionShape(2, n, 0, causal)), LENGTH)
    assert growth < 2.2
    if not causal and getattr(pattern, "globals", 0):
        return  # the masks' rows of global tokens: one block that sees all
    assert (
        backward_growth(lambda n: masked_attention(pattern, call(n, place), AttentionShape(2, n, 0, causal)), LENGTH)
        < 2.2
    )


def test_scores_that_queries_give_to_distances() -> None:
    def run(length: int) -> Tensor:
        return attend(
            Window(32), replace(call(length), query_scores=query_scores(length)), AttentionShape(2, length, 0, True)
        )

    assert backward_growth(run, LENGTH) < 2.2


@pytest.mark.parametrize("place", [None, drawn(Kerple())], ids=["plain", "kerple"])
def test_many_blocks_in_one_call(place: PositionEncoding | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts make several calls, which are the blocks then."""
    monkeypatch.setattr(banded, "SCORES_AT_ONCE", 2**13)
    monkeypatch.setattr(blocks, "ENTRIES_AT_ONCE", 2**13)
    assert backward_growth(lambda n: banded.banded_attention(call(n, place), 20, 11), LENGTH) < 2.2
    for pattern in (BigBird(block=16, random=1), BigBird(block=16, random=1, globals=4)):
        growth = backward_growth(lambda n, p=pattern: attend(p, call(n, place), AttentionShape(2, n, 0, False)), LENGTH)
        assert growth < 2.2


def test_rows_of_a_batch_one_after_another() -> None:
    def run(rows: int) -> Tensor:
        heads = (torch.randn(rows, 1, 32, 4, requires_grad=True) for _ in range(3))
        padding = torch.arange(32)[None] < torch.randint(16, 32, (rows, 1), generator=torch.Generator().manual_seed(0))
        return by_row(lambda q, k, v: q + k + v, *heads, padding)

    assert backward_growth(run, 16) < 2.2


def test_landmarks_write_what_blocks_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their training form is quadratic; gradients of the whole length for every block would be most of it all the same."""
    monkeypatch.setattr(grouped, "QUERIES_AT_ONCE", 11)

    def written() -> float:
        heads = [torch.randn(1, 1, 495, 128, requires_grad=True) for _ in range(3)]
        out = grouped_attention(*heads, 10, 0.5)
        with Written() as counted:
            out.sum().backward()
        return counted.total

    ours = written()
    monkeypatch.setattr(grouped, "Slices", lambda x: x)
    assert ours < 0.5 * written()


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ("window:size=32", 2.2),
        ("bca:size=32", 2.2),
        ("streaming:sinks=2,window=30", 2.2),
        ("local:block=32,globals=0", 2.2),
        ("longnet:segments=32/64,dilations=1/2", 2.2),
        (
            "self-extend:group=4,window=16",
            3.0,
        ),  # quadratic by itself; 3.3 where blocks have gradients of the whole length
    ],
)
def test_methods_on_trained_models(spec: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (spans, trained, near_far, streaming):
        monkeypatch.setattr(module, "QUERIES_AT_ONCE", 32)
    network = tiny.model(64).train()

    def run(length: int) -> Tensor:
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :7] = 0
        ids = torch.randint(2, 264, (2, length))
        return network.model(ids, attention_mask=mask, use_cache=False).last_hidden_state

    with ls.applied(network, spec):
        assert backward_growth(run, 512) < most


@pytest.mark.parametrize("scheme", [Kerple(), T5Bias()], ids=str)
@pytest.mark.parametrize("pattern", [Window(40, 3), LongNet("32/64", "1/2"), Local(48)], ids=lambda p: p.spec)
def test_gradients_are_those_of_the_definition(
    pattern: Pattern, scheme: Kerple | T5Bias, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of queries, keys, values and what biases are made of; two rows, of which one begins later."""
    length, place = 150, drawn(scheme).double()
    padding = torch.arange(length) >= torch.tensor([[0], [21]])
    one = call(length, place, torch.float64)
    heads = [x.detach().repeat(2, 1, 1, 1).requires_grad_() for x in (one.query, one.key, one.value)]
    here = AttentionCall(*heads, 0.5, padding, place.bias)
    got = masked_attention(pattern, here, AttentionShape(2, length, 0, True))
    number = torch.arange(length)[None] - torch.tensor([[0], [21]])
    seen = pattern.mask(number, number, AttentionShape(2, length, 0, True)) & padding[:, None, None]
    seen = seen & (number[:, None, None, :] <= number[:, None, :, None])
    scores = heads[0] @ heads[1].mT * 0.5 + place.bias(number[0, :, None] - number[0])[None].double()
    counts = pattern.multiplicity(number, number, AttentionShape(2, length, 0, True))
    if counts is not None:
        scores = scores + counts.clamp(min=1).double().log()
    exact = reference_mix(scores, heads[2].expand(-1, 2, -1, -1), seen)
    push = torch.randn_like(exact) * padding[:, None, :, None]
    wanted = [*heads, *place.parameters()]
    torch.testing.assert_close(got * padding[:, None, :, None], exact * padding[:, None, :, None], rtol=1e-5, atol=1e-6)
    pairs = (torch.autograd.grad(out, wanted, push) for out in (got, exact))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_grouped_weights_of_one_block_are_those_of_all() -> None:
    scores = torch.randn(1, 22, 22, dtype=torch.float64)
    torch.testing.assert_close(grouped_weights(scores, 10)[:, 11:], grouped_weights(scores[:, 11:], 10, 11))


def test_ranges_that_padding_made_overlap() -> None:
    assert masks._disjoint([(0, 9), (4, 12), (5, 7), (20, 22)]) == [(0, 9), (9, 12), (20, 22)]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "window_backward.py"))
    script["main"](["-l", "64", "-l", "128", "--turns", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 9 and "window:size=256, alibi" in lines[6]
