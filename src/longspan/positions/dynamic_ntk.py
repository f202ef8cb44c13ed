"""Dynamic NTK: RoPE whose base grows with the length of the text, unchanged within the window (Peng 2023, §3.3).

At length l the NTK-aware base has s = factor·l/L - (factor - 1) (factor 1: the paper's s = l/L), and s = 1 up to L. The KV cache
holds keys unrotated, as in the paper: a cache of rotated keys would mix the bases of all earlier lengths, and results would
depend on the chunks of the prefill.

Here l belongs to the query: a query at position i has the base of length i + 1, rounded up past the window to a multiple of
`step`. So prefill, chunked prefill and decoding agree, and step = 1 is the paper's token-by-token decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from longspan.core.facts import ModelFacts, RopeFacts
from longspan.core.method import Method
from longspan.engine.core import attention
from longspan.engine.slices import Slices
from longspan.hf.call import LayerCall
from longspan.hf.rotary import rotate
from longspan.hf.site import Site
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class DynamicNTK(Method):
    """A base by length.

    `factor`: how much faster s grows than the length; `step`: tokens that share a base past the window.
    """

    factor: float = 1.0
    step: int = 512

    name = "dynamic-ntk"
    title = "Dynamic NTK with unrotated keys"
    also = ("dynamic", "ntk-dynamic")
    paper = "emozilla 2023; Peng 2023, arXiv 2309.00071 §3.3"
    slots = frozenset({"frequencies", "attention"})
    cost = "time n² (keys rotated again for every step), cache n"
    why_not_exportable = (
        "its keys are cached unrotated, which no checkpoint can say; "
        "transformers' own `dynamic` type caches rotated keys"
    )

    def __post_init__(self) -> None:
        self.require(1 <= self.factor <= 4096, f"factor must be from 1 to 4096, not {self.factor}")
        self.require(1 <= self.step <= 2**20, f"step must be from 1 to 1m, not {self.step}")

    def check(self, facts: ModelFacts) -> None:
        if facts.rope is None or facts.rope.type != "default":
            raise NotSupported(
                f"dynamic-ntk needs plain rotary positions; {facts.architecture} has "
                + (
                    f"{facts.rope.type} scaling already. Use none, or {facts.rope.beyond}"
                    if facts.rope
                    else "none that can be rescaled. Use none, or a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
                )
            )

    def reach(self, facts: ModelFacts) -> int | None:
        return 4 * facts.window  # beyond about four windows no fixed-data result supports it without training

    def training_reach(self, facts: ModelFacts) -> int | None:
        return int(facts.window * max(4.0, self.factor))

    def neutral_length(self) -> int:
        return 2  # any window is longer

    def attach(self, site: Site) -> None:
        site.unrotate()
        site.attention(partial(self.attend, site))

    def lengths(self, positions: Tensor, window: int) -> Tensor:
        """The length whose base each query has: the window, then steps past it; positions of any shape, window in tokens."""
        past = (positions + 1 - window).clamp(min=0)
        return window + torch.div(past + self.step - 1, self.step, rounding_mode="floor") * self.step

    def inverse_frequencies(self, rope: RopeFacts, length: int) -> list[float]:
        """The NTK-aware frequencies (d/2) at `length` tokens."""
        s = max(1.0, self.factor * length / rope.window - (self.factor - 1))
        theta = rope.theta * s ** (rope.dim / (rope.dim - 2))
        return [theta ** (-i / rope.dim) for i in range(0, rope.dim, 2)]

    def attend(self, site: Site, call: LayerCall) -> Tensor:
        """Attention (B, H, Tq, D) with queries and keys rotated by the bases of the queries' lengths."""
        rope = site.facts.rope
        assert rope is not None
        parts = call.forward.once("parts", lambda: self._parts(call, rope.window))
        layer_type = site.layer_type(call.module)
        heads = Slices(call.query), Slices(call.key), Slices(call.value)
        rows: dict[int | None, list[Tensor]] = {}
        for row, start, end, length in parts:
            if layer_type not in (None, "full_attention"):
                length = rope.window  # a sliding layer never sees further than its window
            out = self._attend_part(site, call, heads, row, start, end, length, layer_type)
            rows.setdefault(row, []).append(out)
        return torch.cat([torch.cat(outs, dim=2) for outs in rows.values()])

    def _parts(self, call: LayerCall, window: int) -> list[tuple[int | None, int, int, int]]:
        """Runs of queries that share a base: (row, or None for all rows; first query; end; length)."""
        shared = call.position_ids.shape[0] == 1 or bool((call.position_ids == call.position_ids[:1]).all())
        parts: list[tuple[int | None, int, int, int]] = []
        for row in range(1 if shared else call.position_ids.shape[0]):
            lengths = self.lengths(call.position_ids[row], window)
            values, counts = torch.unique_consecutive(lengths, return_counts=True)
            start = 0
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                parts.append((None if shared else row, start, start + count, value))
                start += count
        return parts

    def _attend_part(
        self,
        site: Site,
        call: LayerCall,
        heads: tuple[Slices, Slices, Slices],
        row: int | None,
        start: int,
        end: int,
        length: int,
        layer_type: str | None,
    ) -> Tensor:
        """Attention of the queries start … end of a row, or of all rows, under the base of `length`."""
        rows = slice(None) if row is None else slice(row, row + 1)
        offset = call.key.shape[2] - call.query.shape[2]
        last = min(call.key.shape[2], offset + end + call.ahead)  # later keys are invisible to these queries
        query, key, value = heads[0][rows, :, start:end], heads[1][rows, :, :last], heads[2][rows, :, :last]
        pick = (lambda p: p[rows]) if call.position_ids.shape[0] > 1 else (lambda p: p)
        query_positions, key_positions = pick(call.position_ids)[:, start:end], pick(call.key_positions)[:, :last]

        assert site.facts.rope is not None, "check() refuses models without rotary positions"
        rotary = site.rotary.with_frequencies(self.inverse_frequencies(site.facts.rope, length), layer_type)

        def tables(positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
            return rotary.tables(positions, like, layer_type)

        name = f"{layer_type}:{rows}:{start}:{last}:"  # layers whose cache keeps a sliding window have fewer keys
        query = rotate(call.module, query, *call.forward.once(name + "q", lambda: tables(query_positions, query)))
        key = rotate(call.module, key, *call.forward.once(name + "k", lambda: tables(key_positions, key)))
        whole = start == 0 and offset == 0
        if call.mask is not None:
            mask = call.mask[rows] if call.mask.shape[0] > 1 else call.mask
            mask = mask[:, :, start:end, :last]
        elif end - start == 1 or whole:
            mask = None
        else:
            mask = query.new_ones(end - start, last, dtype=torch.bool).tril(offset + start)
        return attention(
            query,
            key,
            value,
            mask,
            call.scale,
            dropout=call.dropout,
            softcap=call.softcap,
            causal=whole and mask is None and end - start > 1,
        )
