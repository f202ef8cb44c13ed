"""The kernels for listed blocks against the formula in float64: on CUDA, or on a CPU with Triton's interpreter
(TRITON_INTERPRET=1), where shapes are small and so are the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan.attention.bigbird import BigBird, visible_lists
from longspan.engine.blocks import lists as block_lists
from longspan.engine.blocks.lists import listed_attention, refusal
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import reference_attention
from longspan.engine.kernels import INTERPRETED
from longspan.util.errors import SpecError

DEVICE = "cpu" if INTERPRETED else "cuda"
TIMES = 1 if INTERPRETED else 4
CASES = {  # batch, heads, key heads, tokens, pattern
    "itc": (2, 4, 2, 160, {"block": 16, "random": 2}),
    "a short last block": (1, 2, 2, 150, {"block": 16, "random": 1}),
    "no random blocks": (1, 4, 1, 128, {"block": 16, "random": 0}),
    "two blocks": (1, 2, 1, 30, {"block": 16}),
    "one block": (2, 2, 1, 9, {"block": 16}),
    "larger blocks": (1, 2, 1, 160, {"block": 32, "random": 1}),
}
WIDTHS = [(torch.float16, 64)] if INTERPRETED else [(torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 64)]


def case(name: str) -> tuple[int, int, int, int, BigBird]:
    batch, heads, kv_heads, tokens, settings = CASES[name]
    given: dict[str, Any] = {**settings, "block": settings["block"] * TIMES}
    return batch, heads, kv_heads, tokens * TIMES, BigBird(**given)


def compare(name: str, width: int, dtype: torch.dtype, tolerance: float) -> None:
    """Forward and every gradient, each error as a share of the largest entry."""
    batch, heads, kv_heads, tokens, pattern = case(name)
    ours = [
        torch.randn(batch, h, tokens, width).to(DEVICE, dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
    ]
    exact = [x.detach().double().requires_grad_() for x in ours]
    assert refusal(*ours, pattern.block) is None
    grid = AttentionShape(heads, tokens, 0, False)
    places = torch.arange(tokens, device=DEVICE)[None]
    got = pattern.run(AttentionCall(*ours, 0.2), grid)
    want = reference_attention(*exact, pattern.mask(places, places, grid), 0.2)
    push = torch.randn(want.shape).to(DEVICE, dtype)
    results = [got, *torch.autograd.grad(got, ours, push)]
    wanted = [want, *torch.autograd.grad(want, exact, push.double())]
    for what, x, y in zip(("out", "query", "key", "value"), results, wanted, strict=True):
        error = (x.double() - y).abs().max() / y.abs().max()
        assert error < tolerance, f"{what}: {float(error.detach()):.1e}"


@pytest.mark.kernels
@pytest.mark.parametrize("name", CASES)
def test_in_float32(name: str) -> None:
    compare(name, 32, torch.float32, 5e-5)


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "width"), WIDTHS)
@pytest.mark.parametrize("name", ["itc", "a short last block"])
def test_in_16_bit(name: str, dtype: torch.dtype, width: int) -> None:
    compare(name, width, dtype, 2e-2)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["itc", "a short last block"])
@pytest.mark.parametrize("longest", [1, 3])
def test_lists_in_parts(name: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_lists, "LONGEST", longest)
    visible_lists.cache_clear()
    try:
        compare(name, 32, torch.float32, 5e-5)
    finally:
        visible_lists.cache_clear()


@pytest.mark.kernels
def test_parts_of_a_list_of_all_blocks_of_a_long_text() -> None:
    """The last of 8,192 parts of a list of 262,144 blocks, all of which are one and the same here."""
    size, parts = 2**18, 2**13
    query, key, value = torch.randn(3, 1, 1, 16, 32, device=DEVICE).unbind()
    tables = torch.tensor([[0, parts - 1, parts, 0]]), torch.tensor([0, size]), torch.zeros(size)
    work, starts, index = (x.to(DEVICE, torch.int32) for x in tables)
    got, lse = torch.empty(1, 1, 1, 16, 32, device=DEVICE), torch.empty(1, 1, 1, 16, device=DEVICE)
    from longspan.engine.blocks.kernels import forward

    forward[(1, 1)](
        *(query, key, value, query, lse, got, lse, work, starts, index, 1, 16, 1, 1, 0.2),
        *block_lists._strides(query, key, value, query),
        **block_lists._choices(query, key, 16),
    )
    want = reference_attention(query, key, value, torch.ones(16, 16, dtype=torch.bool, device=DEVICE), 0.2)
    torch.testing.assert_close(got[:, :, 0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_rows_of_several_lengths() -> None:
    pattern, lengths = BigBird(block=16, random=1), torch.tensor([96, 50, 9])
    x = [torch.randn(3, 2, 96, 32, device=DEVICE) for _ in range(3)]
    padding = (torch.arange(96) < lengths[:, None]).to(DEVICE)
    got = pattern.run(AttentionCall(*x, 0.2, padding), AttentionShape(2, 96, 0, False, lengths))
    for row, length in enumerate(lengths.tolist()):
        alone = [y[row : row + 1, :, :length] for y in x]
        want = pattern.run(AttentionCall(*alone, 0.2), AttentionShape(2, length, 0, False))
        torch.testing.assert_close(got[row : row + 1, :, :length], want)


@pytest.mark.kernels
def test_operators_say_what_they_are() -> None:
    tensors = [torch.randn(1, h, 70, 32, device=DEVICE) for h in (2, 1, 1)]
    lists = visible_lists(BigBird(block=16, random=1), 5, 2, 0, torch.device(DEVICE))
    seeing, seen = lists.seeing.tables, lists.seen.tables
    torch.library.opcheck(torch.ops.longspan.listed_forward, (*tensors, *seeing, 16, 0.2))
    out, lse = torch.ops.longspan.listed_forward(*tensors, *seeing, 16, 0.2)
    given = (out, *tensors, out, lse, *seeing, *seen, 16, 0.2)
    torch.library.opcheck(torch.ops.longspan.listed_backward, given, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "pattern"), [(9, BigBird(block=16)), (2, BigBird(block=16)), (40, BigBird(random=0))]
)
def test_lists_are_the_pattern(count: int, pattern: BigBird) -> None:
    """Each block's list, both ways, by what the pattern itself says of its first token."""
    heads, lists = 3, visible_lists(pattern, count, 3, 2, torch.device("cpu"))
    places = torch.arange(count)[None] * pattern.block
    meets = pattern.mask(places, places, AttentionShape(heads, count * pattern.block, 2, False))[0].expand(
        heads, -1, -1
    )
    for found, wanted in ((lists.seeing, meets), (lists.seen, meets.mT)):
        again = torch.zeros_like(wanted)
        for place, (begin, end) in enumerate(zip(found.starts[:-1].tolist(), found.starts[1:].tolist(), strict=True)):
            again[place // count, place % count, found.index[begin:end].long()] = True
            assert len(found.index[begin:end].unique()) == end - begin
        assert torch.equal(again, wanted)


@pytest.mark.parametrize(("longest", "sizes"), [(4, [3, 9, 1, 8, 4]), (32, [3, 9]), (1, [2, 1, 3])])
def test_long_lists_are_worked_off_in_parts(longest: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_lists, "LONGEST", longest)
    work, owners = block_lists._work(torch.tensor(sizes))
    parts = [-(-size // longest) for size in sizes]
    assert sorted(work[:, :2].tolist()) == [[b, p] for b, many in enumerate(parts) for p in range(many)]
    assert owners[:, [0, 2]].tolist() == [[b, many] for b, many in enumerate(parts) if many > 1]
    slots = {(b, p): slot for b, p, _, slot in work.tolist()}
    for block, first, many in owners.tolist():
        assert [slots[block, p] for p in range(many)] == list(range(first, first + many))
    assert all(slots[b, 0] == -1 for b, many in enumerate(parts) if many == 1)
    assert sorted(slot for slot in slots.values() if slot >= 0) == list(range(sum(n for n in parts if n > 1)))
    shares = [-(-sizes[b] // many) for b, _, many, _ in work.tolist()]
    assert shares == sorted(shares, reverse=True) and max(shares) <= longest


def test_lists_of_another_length() -> None:
    x = torch.randn(1, 2, 70, 32)
    with pytest.raises(SpecError, match="do not fit"):
        listed_attention(x, x, x, visible_lists(BigBird(block=16), 6, 2, 0, torch.device("cpu")), 0.2)
    assert "blocks" in str(refusal(x, x, x, 24))
