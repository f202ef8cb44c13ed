"""LongNet over processes: on 2 and 4 of them what one computes, forward and backward."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longspan.attention.longnet import LongNet
from longspan.compare.running.runner import modules_to_preload
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.dilated.shards import dilated_over_processes
from longspan.util.errors import NotSupported

LENGTH, HEADS, SCALE = 48, 6, 0.4
SPECS = [("4/12/24/48", "1/2/3/4"), ("6/96", "1/6"), ("24/48", "1/2"), ("12/24", "1/12")]
"""Segments within a stretch, over some and over all of them, and longer than the text; dilations beyond the heads."""
UNEVEN = ("36/48", "1/2")
"""Of stretches of 12 tokens: three and one more in segments of three."""


def specs(count: int) -> list[tuple[str, str]]:
    return [*SPECS, UNEVEN] if LENGTH // count == 12 else SPECS


def inputs(kv_heads: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randn(2, h, LENGTH, 8, generator=draw, dtype=torch.float64) for h in (HEADS, kv_heads, kv_heads, HEADS)
    ]


def work(rank: int, count: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    found = []
    for segments, dilations in specs(count):
        for causal, kv_heads in ((True, 2), (False, 6)):
            *leaves, pull = (x.chunk(count, dim=2)[rank].contiguous().requires_grad_() for x in inputs(kv_heads))
            patterns = LongNet(segments, dilations).patterns
            out = dilated_over_processes(*leaves, patterns, causal=causal, scale=SCALE)
            grads = torch.autograd.grad((out * pull.detach()).sum(), leaves)
            found.append([out.detach(), *grads])
    with pytest.raises(NotSupported, match="do not fit"):
        dilated_over_processes(*leaves, [(5, 1)], causal=True, scale=SCALE)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [2, 4])
def test_equals_one_process(count: int, tmp_path: Path) -> None:
    # One server imports for all; where comparisons are tested in this process too, it is theirs.
    multiprocessing.set_forkserver_preload(["pytest", *modules_to_preload("llama")])
    mp.start_processes(work, (count, str(tmp_path)), count, start_method="forkserver")
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(count)]
    number = 0
    for segments, dilations in specs(count):
        for causal, kv_heads in ((True, 2), (False, 6)):
            *leaves, pull = inputs(kv_heads)
            for x in leaves:
                x.requires_grad_()
            out = LongNet(segments, dilations).run(
                AttentionCall(*leaves, SCALE), AttentionShape(HEADS, LENGTH, 0, causal)
            )
            wanted = [out, *torch.autograd.grad((out * pull).sum(), leaves)]
            for n, right in enumerate(wanted):
                torch.testing.assert_close(torch.cat([s[number][n] for s in shards], dim=2), right)
            number += 1
