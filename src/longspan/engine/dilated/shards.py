"""LongNet's dilated attention with a text spread over processes (Ding 2023, section 3.1).

Each process has one equal stretch of the text, in the order of ranks. Segments that lie within a stretch are computed there. Of
longer ones each process hands round what takes part, every r-th key and value of a head's offset, so that what is sent shrinks as
the dilation grows; a query then meets the keys of its own segment, in a decoder those of earlier stretches and of its own. The
gradient of what was handed round comes back the same way. This follows the paper's equations: the authors' code gives the first
process keys of zeros, which take weight.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from longspan.engine.core import expand_heads
from longspan.engine.joint import Chunk, Lane, Part, joint_attention
from longspan.util.errors import NotSupported


def dilated_over_processes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    patterns: list[tuple[int, int]],
    *,
    causal: bool,
    scale: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(B, H, T, D), of this process's T tokens; key and value (B, H_kv, T, D). patterns: LongNet's (segment, dilation).

    Every process of `group` calls it with as many tokens. Raises `NotSupported` where the ends of a segment and of a
    stretch lie across one another, or a dilation does not divide the stretch.
    """
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    heads, length = query.shape[1:3]
    patterns = [(min(size, length * count), step) for size, step in patterns]  # no segment is longer than the text
    _check(patterns, length)
    key, value = expand_heads(key, heads), expand_heads(value, heads)
    parts: list[Part] = []
    buffers, at = [torch.cat((key, value), dim=-1)], length
    for size, step in patterns:
        if size <= length:
            parts += _within(length, size, step, heads, causal)
            continue
        first, each = rank * length // size * (size // length), length // step
        last = min(first + size // length, count)  # the text may end before its last segment does
        others = [r for r in range(first, last) if (r < rank if causal else r != rank)]
        for offset in range(min(step, heads)):
            some, own = slice(offset, None, step), Lane(offset, length - offset, length, step)
            parts.append(Part(1, own, own, causal, some))
            parts += [Part(1, own, Lane(at + other * each, each), False, some) for other in others]
        buffers += _handed_round(buffers[0], step, group)
        at += count * each
    keys, values = torch.cat(buffers, dim=2).chunk(2, dim=-1)
    return joint_attention(query, keys, values, [Chunk(0, length, parts)], scale)


def _check(patterns: list[tuple[int, int]], length: int) -> None:
    for size, step in patterns:
        if length % size if size <= length else size % length or length % step:
            fitting = math.lcm(*(s for s, _ in patterns if s <= length), *(r for _, r in patterns))
            raise NotSupported(
                f"segments of {size:,} with dilation {step} do not fit stretches of {length:,} tokens: let the stretch be a "
                f"multiple of the shorter segments and of the dilations ({fitting:,}), and the longer segments of the stretch"
            )


def _within(length: int, size: int, step: int, heads: int, causal: bool) -> list[Part]:
    """Segments of a stretch that holds whole ones."""
    lanes = [Lane(offset, size - offset, size, step) for offset in range(min(step, heads))]
    return [Part(length // size, at, at, causal, slice(n, None, step)) for n, at in enumerate(lanes)]


def _handed_round(x: Tensor, step: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Of x (B, H, T, ·) every `step`-th token from each head's own offset on, (B, H, T / step, ·), of every process by rank. All
    are in every process's graph, whether it needs them or not: each must take part when gradients are sent back."""
    offsets = torch.arange(x.shape[1], device=x.device) % step
    steps = x.unflatten(2, (-1, step))
    index = offsets.view(1, -1, 1, 1, 1).expand(*steps.shape[:3], 1, steps.shape[4])
    return list(all_gather(steps.gather(3, index).squeeze(3).contiguous(), group or dist.group.WORLD))
