"""Attention over a local context and a memory of any length in one softmax, with the memory in blocks that may lie in CPU memory.

    L = log Σᵢ exp Lᵢ        out = Σᵢ exp(Lᵢ - L) outᵢ

Each block of the memory, and the local context, is one dense call that also gives its log-sum-exps Lᵢ; put together so, the
result is the softmax over all keys. What lies in CPU memory passes through the GPU block by block, the next one being copied
while the one before it is used. Or each query picks the `k` keys of the memory with the highest inner products, and only these
join the local context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from longspan.engine.core import causal_mask, expand_heads
from longspan.engine.joint import _kernel, _wide
from longspan.engine.retrieval.top import GATHERED_AT_ONCE, FaissIndex, nearest_among

BLOCK = 2**14
"""Tokens of a block."""

Pair = tuple[Tensor, Tensor]
Pieces = tuple[Tensor, Tensor]
Indexes = dict[tuple[int, int], FaissIndex]
"""faiss' index of each row's and key head's memory, which grows with it."""


class Store:
    """Keys and values (B, H_kv, T, D) of one layer, in blocks of at most `BLOCK` tokens: where they came from, or with `offload`
    in CPU memory, pinned where there is a GPU. Only ever appended to."""

    def __init__(self, offload: bool = False):
        self.offload = offload
        self.blocks: list[Pair] = []
        self.length = 0
        self._filled = 0
        """Tokens in the last block, which may have room for more."""

    def append(self, key: Tensor, value: Tensor) -> None:
        """Takes in n more tokens, (B, H_kv, n, D) each; without gradients."""
        key, value = key.detach(), value.detach()
        while key.shape[2]:
            room = self._room(key, value)
            end = self._filled + min(room, key.shape[2])
            for block, new in zip(self.blocks[-1], (key, value), strict=True):
                block[:, :, self._filled : end] = new[:, :, : end - self._filled]
            taken, self._filled = end - self._filled, end
            self.length += taken
            key, value = key[:, :, taken:], value[:, :, taken:]

    def _room(self, key: Tensor, value: Tensor) -> int:
        """Free places of the last block.

        The first one grows by doubling, so that a short text takes little.
        """
        size = self.blocks[-1][0].shape[2] if self.blocks else 0
        if self._filled < size:
            return size - self._filled
        grows = len(self.blocks) < 2 and size < BLOCK
        wanted = min(BLOCK, max(2 * size, key.shape[2])) if grows else BLOCK
        new = self._empty(key, wanted), self._empty(value, wanted)
        if grows and self.blocks:
            for block, old in zip(new, self.blocks.pop(), strict=True):
                block[:, :, :size] = old
        else:
            self._filled = 0
        self.blocks.append(new)
        return wanted - self._filled

    def _empty(self, like: Tensor, tokens: int) -> Tensor:
        shape = *like.shape[:2], tokens, like.shape[3]
        with torch.inference_mode(False):  # what is written in place must not belong to one inference mode
            if not self.offload:
                return like.new_empty(shape)
            return torch.empty(shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())

    def parts(self) -> list[tuple[Pair, int]]:
        """The blocks with how many of each one's tokens are filled."""
        sizes = [b[0].shape[2] for b in self.blocks[:-1]] + [self._filled] * bool(self.blocks)
        return list(zip(self.blocks, sizes, strict=True))

    def whole(self) -> Pair | None:
        """All keys and values, (B, H_kv, T, D), in one piece; None where there are none."""
        if not self.length:
            return None
        parts = self.parts()
        key, value = (torch.cat([pair[i][:, :, :size] for pair, size in parts], dim=2) for i in (0, 1))
        return key, value

    def copy(self) -> Store:
        """Another one that can be appended to by itself; full blocks are shared, since nothing writes into them."""
        made = Store(self.offload)
        made.blocks, made.length, made._filled = list(self.blocks), self.length, self._filled
        if made.blocks and self._filled < self.blocks[-1][0].shape[2]:
            last = made.blocks.pop()
            made.blocks.append((self._like(last[0]), self._like(last[1])))
        return made

    def _like(self, block: Tensor) -> Tensor:
        with torch.inference_mode(False):  # as in _empty
            made = block.clone()
            return made.pin_memory() if block.is_pinned() else made

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the rows of every block."""
        with torch.inference_mode(False):
            self.blocks = [(change(key), change(value)) for key, value in self.blocks]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, their empty places among them."""
        return sum(key.nbytes + value.nbytes for key, value in self.blocks)


@dataclass
class Earlier:
    """The first `length` tokens of rows that are alike: of a store, from its column `first` on, and, behind them, of `late`.
    All are read in the dtype of `late`: under autocast a store holds keys in float32."""

    store: Store | None
    rows: slice
    first: int
    late: Pair
    length: int
    indexes: Indexes = field(default_factory=dict)
    """Kept by whoever asks, from one part of a text to the next."""

    @property
    def late_count(self) -> int:
        return self.late[0].shape[2]

    def pieces(self, device: torch.device, head: int | None = None, which: tuple[int, ...] = (0, 1)) -> Iterator[tuple]:
        """The memory in order, on `device`: tuples of keys and values (B, H_kv, n, D), or with `head` (B, n, D) of one key head;
        `which`: keys alone are (0,)."""
        wanted, cuts, at = [], [], 0
        heads = slice(None) if head is None else head
        end = self.length + self.first - self.late_count
        for pair, size in self.store.parts() if self.store else []:
            left, right = max(0, self.first - at), min(size, end - at)
            if left < right:
                wanted.append(tuple(pair[i][self.rows, heads] for i in which))
                cuts.append(slice(left, right))
            at += size
        for moved, cut in zip(ahead(wanted, device), cuts, strict=True):
            yield tuple(x[..., cut, :].to(self.late[i].dtype) for i, x in zip(which, moved, strict=True))
        if self.late_count:
            yield tuple(self.late[i][:, heads] for i in which)

    def take(self, row: int, head: int, index: Tensor) -> Pair:
        """Keys and values (…, D) of one row and key head at `index` (…); only what is taken is moved."""
        flat = index.flatten()
        found = [x.new_empty(len(flat), x.shape[-1]) for x in self.late]
        for at, size, pair in self._places(row, head):
            here = ((flat >= at) & (flat < at + size)).nonzero()[:, 0]
            for out, x in zip(found, pair, strict=True):
                out[here] = x.index_select(0, (flat[here] - at).to(x.device)).to(out)
        key, value = (x.view(*index.shape, -1) for x in found)
        return key, value

    def _places(self, row: int, head: int) -> Iterator[tuple[int, int, Pair]]:
        """Where each piece begins, how many tokens it has, and its keys and values (n, D)."""
        begin = (self.rows.start or 0) + row
        at, end = -self.first, self.length - self.late_count
        for (key, value), size in self.store.parts() if self.store else []:
            left, right = max(0, -at), min(size, end - at)
            if left < right:
                yield at + left, right - left, (key[begin, head, left:right], value[begin, head, left:right])
            at += size
        if self.late_count:
            yield end, self.late_count, (self.late[0][row, head], self.late[1][row, head])


def ahead(wanted: list[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Each of `wanted` on `device`; what lies in CPU memory is copied to a GPU one ahead, on a stream of its own."""
    if device.type != "cuda":
        yield from (tuple(x.to(device) for x in some) for some in wanted)
        return
    if all(x.device == device for some in wanted for x in some):
        yield from wanted
        return
    side, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(some: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
        with torch.cuda.stream(side):
            moved = tuple(x.to(device, non_blocking=True) for x in some)
            return moved, side.record_event()

    following = fetch(wanted[0])
    for some in [*wanted[1:], None]:
        moved, ready = following
        if some is not None:
            following = fetch(some)
        here.wait_event(ready)
        for x in moved:
            x.record_stream(here)
        yield moved


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Earlier,
    scale: float,
    *,
    softcap: float | None = None,
    far: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """(B, H, T, D): every query sees the whole memory, and of the local keys (B, H_kv, L, D) those up to its own, the last
    query's being the last one, or the last `window` of these. far: the queries as the memory meets them, where that is
    otherwise."""
    out, lse = _local(query, key, value, scale, softcap, window)
    for keys, values in memory.pieces(query.device):
        out, lse = _together(out, lse, *_folded(query if far is None else far, keys, values, scale, softcap))
    return out.to(query.dtype)


def attend_nearest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory: Earlier,
    k: int,
    scale: float,
    *,
    search: Literal["torch", "faiss"] = "torch",
    softcap: float | None = None,
    far: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The same where each query sees, of the memory, the `k` keys of its head with the highest inner products alone."""
    if memory.length <= k:
        return attend(query, key, value, memory, scale, softcap=softcap, far=far, window=window)
    out, lse = _local(query, key, value, scale, softcap, window)
    asked = _fold(query if far is None else far, key.shape[1])
    rows = [
        [_picked(asked[row, head], memory, row, head, k, scale, search, softcap) for head in range(key.shape[1])]
        for row in range(len(query))
    ]
    parts = [torch.stack([torch.stack([pair[i] for pair in heads]) for heads in rows]) for i in (0, 1)]
    out, lse = _together(out, lse, *(_unfold(x, query) for x in parts))
    return out.to(query.dtype)


def _picked(
    asked: Tensor,
    memory: Earlier,
    row: int,
    head: int,
    k: int,
    scale: float,
    search: Literal["torch", "faiss"],
    softcap: float | None,
) -> Pieces:
    """Result (Q, D) and log-sum-exps (Q,) of one row's and key head's queries (Q, D) over the keys that each of them picks."""
    if search == "faiss":
        picks = _indexed(memory, row, head, asked.device)(asked, k)
    else:
        parts = (keys[row] for (keys,) in memory.pieces(asked.device, head, (0,)))
        picks = nearest_among(asked, parts, k)
    few = max(1, GATHERED_AT_ONCE // (2 * k * asked.shape[1]))
    outs, sums = [], []
    for some, index in zip(asked.split(few), picks.split(few), strict=True):
        keys, values = memory.take(row, head, index)
        scores = _scores(some[:, None], keys, scale, softcap)
        total = scores.logsumexp(-1)
        outs.append(((scores - total[..., None]).exp() @ values.to(scores.dtype))[:, 0])
        sums.append(total[:, 0])
    return torch.cat(outs), torch.cat(sums)


def _indexed(memory: Earlier, row: int, head: int, device: torch.device) -> FaissIndex:
    """faiss' index of the row's and head's whole memory: what it lacks is added."""
    place = ((memory.rows.start or 0) + row, head)
    index = memory.indexes.get(place)
    known = 0 if index is None else index.index.ntotal
    at = 0
    for (keys,) in memory.pieces(torch.device("cpu"), head, (0,)):
        new = keys[row, max(0, known - at) :]
        at += keys.shape[1]
        if not len(new):
            continue
        if index is None:
            index = memory.indexes[place] = FaissIndex(new, "faiss", 0)
        else:
            index.add(new)
    assert index is not None, "a memory that is searched is not empty"
    return index


# One piece: its result and its log-sum-exps.


def within(new: int, held: int, window: int | None, device: torch.device) -> Tensor:
    """(new, held) boolean: causal, the queries being the last of the keys, and no more than `window` keys each."""
    seen = causal_mask(new, held, device)
    return seen if window is None else seen.triu(held - new - window + 1)


def _local(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, window: int | None
) -> Pieces:
    """Causal attention where the T queries are the last of the L keys: without a window, all see the first L - T keys."""
    new, held = query.shape[2], key.shape[2]
    if window is not None and window < held:
        keys, values = (expand_heads(x, query.shape[1]) for x in (key, value))
        scores = _scores(query, keys, scale, softcap)
        scores = scores.masked_fill(~within(new, held, window, query.device), float("-inf"))
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp() @ values.to(scores.dtype), lse
    before = held - new
    heads = query.shape[1]
    new_key, new_value = (expand_heads(x[:, :, before:], heads) for x in (key, value))
    out, lse = _piece(query, new_key, new_value, scale, softcap, causal=new > 1)
    if before:
        out, lse = _together(out, lse, *_folded(query, key[:, :, :before], value[:, :, :before], scale, softcap))
    return out.to(_wide(query)), lse


def _folded(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Pieces:
    """Attention of all queries to all keys; query heads that share a key head stand in one row of queries."""
    out, lse = _piece(_fold(query, key.shape[1]), key, value, scale, softcap, causal=False)
    return _unfold(out, query), _unfold(lse, query)


def _piece(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, *, causal: bool) -> Pieces:
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if softcap is None and not wants and value.shape[-1] == query.shape[-1]:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return _kernel(query)[0](query, key, value, scale, causal)
    scores = _scores(query, key, scale, softcap)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ value.to(scores.dtype), lse


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = query.to(_wide(query)) @ key.to(_wide(query)).mT * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _together(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Pieces:
    total = torch.logaddexp(lse, other_lse.to(lse.dtype))
    mixed = out * (lse - total).exp()[..., None] + other.to(lse.dtype) * (other_lse - total).exp()[..., None]
    return mixed, total


def _fold(query: Tensor, kv_heads: int) -> Tensor:
    """(B, H, T, D) → (B, H_kv, H / H_kv · T, D)."""
    return query.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _unfold(x: Tensor, query: Tensor) -> Tensor:
    """The inverse, for a result or log-sum-exps: (B, H_kv, …, T, …) → (B, H, T, …)."""
    return x.unflatten(2, (-1, query.shape[2])).flatten(1, 2)
