"""Slices of one tensor: the same numbers and gradients as plain ones, at the cost of what the slices hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from growth import Written, backward_growth
from longspan.engine.slices import Slices

ALL = slice(None)
INDEXES: list[Any] = [
    (ALL, ALL, slice(0, 10)),
    (ALL, ALL, slice(5, 20)),
    (ALL, ALL, slice(20, None, 3)),
    (ALL, 0),
    1,
    (ALL, ALL, torch.tensor([3, 3, 5, 39])),
    (torch.arange(2)[:, None], torch.tensor([[1, 2, 2]]), torch.full((2, 3), 7)),
    (ALL, ALL, ALL),
]


def tensor() -> Tensor:
    return torch.randn(2, 3, 40, 4, dtype=torch.float64, requires_grad=True)


def mixed(x: Tensor, sliced: Callable[[Tensor], Any] = Slices) -> Tensor:
    parts = sliced(x)
    return torch.stack([(parts[index].sin() * (i + 1)).square().sum() for i, index in enumerate(INDEXES)])


def test_gradients_are_those_of_plain_slices() -> None:
    x = tensor()
    out, plain = mixed(x), mixed(x, lambda x: x)
    assert torch.equal(out, plain)
    exact = torch.autograd.grad(plain.sum(), x)[0]
    for _ in range(2):  # a second run begins with a buffer of its own
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x, retain_graph=True)[0], exact)
    torch.testing.assert_close(torch.func.grad(lambda x: mixed(x).sum())(x.detach()), exact)


@pytest.mark.parametrize("some", [[0], [1, 4], [len(INDEXES) - 1], [2, 5, 6]])
def test_slices_that_nothing_comes_back_to(some: list[int]) -> None:
    x = tensor()
    got, exact = (torch.autograd.grad(out[some].sum(), x)[0] for out in (mixed(x), mixed(x, lambda x: x)))
    torch.testing.assert_close(got, exact)


def test_second_derivatives() -> None:
    x = torch.randn(1, 1, 6, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        parts = Slices(x)
        return torch.cat(
            [parts[:, :, 0:4].sin(), parts[:, :, 2:6].square(), parts[:, :, torch.tensor([1, 1])].exp()], 2
        )

    assert torch.autograd.gradcheck(run, (x,)) and torch.autograd.gradgradcheck(run, (x,))


def test_views_where_no_gradient_is_wanted() -> None:
    x = tensor()
    with torch.no_grad():
        assert Slices(x)[:, :, 3:5]._base is not None
    assert Slices(x.detach())[:, :, 3:5].data_ptr() == x[:, :, 3:5].data_ptr()
    piece = Slices(x)[:, :, 3:5]
    assert piece.requires_grad and piece.data_ptr() == x[:, :, 3:5].data_ptr()


def test_sums_are_wide() -> None:
    """A thousand blocks see the first token; in bfloat16 their sum would end at 256."""
    x = torch.ones(1, 1, 4, 1, dtype=torch.bfloat16, requires_grad=True)
    parts = Slices(x)
    sum(parts[:, :, :1].float().sum() for _ in range(1000)).backward()  # type: ignore[union-attr]
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert x.grad.flatten().tolist() == [1000, 0, 0, 0]


def test_what_backward_writes_grows_with_the_length() -> None:
    def blocks(length: int, sliced: Callable[[Tensor], Any] = Slices) -> Tensor:
        parts = sliced(torch.zeros(1, 1, length, 4, requires_grad=True))
        return torch.cat([parts[:, :, max(0, at - 16) : at + 16] for at in range(0, length, 16)], dim=2)

    assert backward_growth(blocks, 1024) < 2.05
    assert backward_growth(lambda length: blocks(length, lambda x: x), 1024) > 3.5  # what it is there for


def test_prefixes_cost_what_they_hold() -> None:
    """Blocks of a causal text that see all before them: one buffer beside."""
    x = torch.zeros(1, 1, 2048, 4, requires_grad=True)
    parts = Slices(x)
    out = torch.stack([parts[:, :, :end].sum() for end in range(16, 2049, 16)]).sum()
    with Written() as counted:
        out.backward()
    seen = sum(range(16, 2049, 16)) * 16
    assert counted.total < 1.1 * seen + 3 * x.numel() * 4
