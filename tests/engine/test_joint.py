"""One softmax over several pieces against the same by its formula, with every key counted as often as pieces hold it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.engine import joint
from longspan.engine.joint import Chunk, Lane, Part, by_row, joint_attention, plain, plain_backward

LENGTH, HEADS = 24, 4
PARTS = [
    Chunk(0, 12, [Part(2, Lane(0, 6, 6), Lane(0, 6, 6), True), Part(1, Lane(0, 12), Lane(20, 3))]),
    Chunk(
        12,
        24,
        [
            Part(3, Lane(12, 4, 4), Lane(8, 4, 4)),
            Part(2, Lane(13, 5, 6, 2), Lane(13, 5, 6, 2), True, slice(1, None, 2)),
            Part(1, Lane(12, 12, step=3), Lane(0, 24, step=2), False, slice(0, None, 3)),
        ],
    ),
]


def tensors(dtype: torch.dtype = torch.float64, length: int = LENGTH) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = [(2, h, length, 8) for h in (HEADS, 2, 2, HEADS)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def numbers(lane: Lane, piece: int) -> list[int]:
    first = lane.start + piece * lane.period
    return list(range(first, first + lane.length, lane.step))


def counts(chunks: list[Chunk] = PARTS) -> Tensor:
    """(H, T, T): in how many pieces a query meets a key, one entry at a time."""
    found = torch.zeros(HEADS, LENGTH, LENGTH)
    for part in (p for chunk in chunks for p in chunk.parts):
        for piece in range(part.pieces):
            for i, query in enumerate(numbers(part.queries, piece)):
                for j, key in enumerate(numbers(part.keys, piece)):
                    if not part.causal or j <= i:
                        found[part.heads, query, key] += 1
    return found


def formula(query: Tensor, key: Tensor, value: Tensor, counted: Tensor, scale: float) -> Tensor:
    key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
    weights = counted * (query @ key.mT * scale).exp()
    return weights / weights.sum(-1, keepdim=True) @ value


def test_sum_of_parts() -> None:
    """Forward and backward, with keys shared by query heads, keys in several pieces, and several chunks."""
    assert counts().max() == 2 and (counts().sum(-1) > 0).all()
    query, key, value, pull = tensors()
    got = joint_attention(query, key, value, PARTS, 0.3)
    wanted = formula(query, key, value, counts().double(), 0.3)
    torch.testing.assert_close(got, wanted)
    ours, theirs = (torch.autograd.grad((x * pull).sum(), (query, key, value)) for x in (got, wanted))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(joint_attention(query, key, value, PARTS, 0.3), wanted)


def test_detached_weights() -> None:
    """Two parts under α = softmax of their log-sum-exps: no gradient passes through α."""
    query, key, value, pull = tensors()
    halves = [Part(1, Lane(0, 24), Lane(0, 16)), Part(1, Lane(0, 24), Lane(8, 16))]
    wide = [x.repeat_interleave(2, 1) for x in (key, value)]
    outs, sums = [], []
    for first in (0, 8):
        k, v = (x[:, :, first : first + 16] for x in wide)
        scores = query @ k.mT * 0.3
        outs.append(scores.softmax(-1) @ v)
        sums.append(scores.logsumexp(-1))
    alpha = torch.stack(sums).softmax(0)[..., None]
    chunks = [Chunk(0, 24, halves)]
    for detached in (False, True):
        wanted = sum((alpha.detach() if detached else alpha) * torch.stack(outs))
        got = joint_attention(query, key, value, chunks, 0.3, detached=detached)
        torch.testing.assert_close(got, wanted)
        ours = torch.autograd.grad((got * pull).sum(), (query, key, value))
        torch.testing.assert_close(
            ours, torch.autograd.grad((wanted * pull).sum(), (query, key, value), retain_graph=True)
        )


def test_half_precision_is_as_near_as_dense() -> None:
    query, key, value, pull = tensors(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    counted = counts()

    def all_of(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        return [out.double(), *(g.double() for g in torch.autograd.grad((out * pull.to(out.dtype)).sum(), inputs))]

    wanted = all_of(formula(*exact, counted.double(), 0.3), exact)
    given = [query, key, value]
    ours = all_of(joint_attention(query, key, value, PARTS, 0.3), given)
    theirs = all_of(formula(query, key, value, counted.bfloat16(), 0.3), given)
    for a, b, c in zip(ours, theirs, wanted, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("most", [2**26, 1100, 50])
def test_plain_products_equal_the_kernel(monkeypatch: pytest.MonkeyPatch, causal: bool, most: int) -> None:
    """Cut into any tiles."""
    monkeypatch.setattr(joint, "MOST_SCORES", most)
    q, k, v, pull = (x.detach().repeat_interleave(HEADS // x.shape[1], 1) for x in tensors())
    out, lse = joint._cpu(q, k, v, 0.3, causal)
    torch.testing.assert_close(plain(q, k, v, 0.3, causal), (out, lse))
    joined = lse + 0.7  # as if other parts had keys too
    ours, theirs = (f(pull, q, k, v, out, joined, 0.3, causal) for f in (plain_backward, joint._cpu_backward))
    torch.testing.assert_close(ours, theirs)


def test_rows_by_themselves() -> None:
    query, key, value, _ = tensors()
    real = torch.arange(LENGTH) < torch.tensor([[17], [0]])

    def mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v.mean(2, keepdim=True).repeat_interleave(2, 1).expand_as(q)

    got = by_row(mean, query, key, value, real)
    torch.testing.assert_close(
        got[0, :, :17], value[0, :, :17].mean(1, keepdim=True).repeat_interleave(2, 0).expand(-1, 17, -1)
    )
    assert not got[0, :, 17:].any() and not got[1].any()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_cuda(dtype: torch.dtype) -> None:
    """The GPU's kernels, with 16-bit sums no farther from float64 than dense attention's."""
    query, key, value, pull = (x.detach().cuda().requires_grad_() for x in tensors(dtype))
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    counted = counts().cuda()
    wanted = formula(*exact, counted.double(), 0.3)
    wanted = [wanted, *torch.autograd.grad((wanted * pull.double()).sum(), exact)]
    for one, way in ((1, joint_attention), (2, formula)):
        out = way(query, key, value, PARTS if one == 1 else counted.to(dtype), 0.3)
        made = [out, *torch.autograd.grad((out * pull).sum(), (query, key, value))]
        errors = [(a.double() - c).norm() for a, c in zip(made, wanted, strict=True)]
        if one == 1:
            ours = errors
    for a, b, c in zip(ours, errors, wanted, strict=True):
        assert a <= 2 * b + 1e-6 * c.norm()
