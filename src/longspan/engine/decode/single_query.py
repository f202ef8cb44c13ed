"""Attention of one query per row over a whole KV cache, in a Triton kernel for decoding.

One query leaves a fused kernel little to do at once, so the keys are split: each program takes a run of keys of one key-value
head, with all the query heads that share it, and the last one to finish joins the parts, which is one softmax over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.engine import kernels
from longspan.util.device import on_device

KEYS = 64
"""Keys that one program takes at a time."""
PROGRAMS = 256
"""As many as a large GPU runs side by side, twice."""


def serves(query: Tensor, key: Tensor, softcap: float | None = None) -> bool:
    """Whether the kernel can answer: one query (B, H, 1, D) on CUDA, 16-bit, heads of a power-of-two width."""
    width = query.shape[-1]
    return (
        query.shape[2] == 1
        and query.dtype in (torch.bfloat16, torch.float16)
        and softcap is None
        and key.shape[-1] == width
        and 16 <= width <= 256
        and width & (width - 1) == 0
        and kernels.refusal(query.device) is None
    )


def one_query_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(B, H, 1, D) from query (B, H, 1, D) over all of key and value (B, Hkv, S, D): nothing is masked. Calls on one device
    follow one another, on one stream: they share the counters by which a program knows that it is the last."""
    from longspan.engine.decode.kernels import attend

    batch, heads, _, width = query.shape
    kv_heads, size = key.shape[1], key.shape[2]
    blocks = -(-size // KEYS)
    parts = 1  # a power of two, so that the last program joins them at once
    while 2 * parts <= min(blocks, max(1, PROGRAMS // (batch * kv_heads))):
        parts *= 2
    group = heads // kv_heads
    rows = max(16, 1 << (group - 1).bit_length())
    out = torch.empty(batch, heads, 1, width, dtype=query.dtype, device=query.device)
    partial = torch.empty(batch * kv_heads * parts * rows * width, dtype=torch.float32, device=query.device)
    weight = torch.empty(batch * kv_heads * parts * rows * 2, dtype=torch.float32, device=query.device)
    with on_device(query.device):
        attend[(batch * kv_heads, parts)](
            query,
            key,
            value,
            out,
            partial,
            weight,
            _counters(query.device, batch * kv_heads),
            size,
            kv_heads,
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            SCALE=scale * 1.4426950408889634,  # powers of two are what the hardware has
            GROUP=group,
            ROWS=rows,
            WIDTH=width,
            KEYS=KEYS,
            BLOCKS=-(-blocks // parts),
            PARTS=parts,
            num_warps=2 if width <= 64 else 4,
        )
    return out


_arrived: dict[tuple[torch.device, int], Tensor] = {}


def _counters(device: torch.device, count: int) -> Tensor:
    """How many programs of each head have arrived; every call leaves zeros behind."""
    if (device, count) not in _arrived:
        _arrived[device, count] = torch.zeros(count, dtype=torch.int32, device=device)
    return _arrived[device, count]
