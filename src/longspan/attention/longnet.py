"""LongNet's dilated attention: several segment lengths, in each of which only every r-th token attends (Ding 2023, §2.2).

Pattern i splits the text into segments of w_i tokens. Head j selects from each segment the tokens at index p with
p mod r_i = s_ij, s_ij = j mod r_i (eq. 9), as queries, keys and values (eq. 4-6), which attend to one another. The results of the
patterns are summed with weights α_i, the shares of their softmax denominators (eq. 10-11); a pattern that does not select a query
has none. This is one softmax over the keys of all patterns, in which a key of m patterns counts m times: m is `multiplicity`, and
log m is added to the score.

Decoding is the same rule: on head j pattern i selects token t if (t mod w_i) mod r_i = s_ij, for keys of its segment.

The authors' code (torchscale) assigns offsets to groups of neighbouring heads, which, for r that divides the number of heads,
only renumbers heads, and pads texts with zero keys that are not masked; neither is done here. It passes no gradient through α, as
`weights=detached` does for texts that are read whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from longspan.attention.trained import OnTrained
from longspan.core.facts import ModelFacts
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.dilated import attention as dilated
from longspan.engine.dilated.attention import dilated_attention, refusal
from longspan.engine.joint import Chunk, Lane, Part, by_row, joint_attention
from longspan.engine.patterns import masked_attention
from longspan.hf.site import Site
from longspan.lm.configuration import LongspanConfig
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported
from longspan.util.units import read_size

TOKENS_AT_ONCE = 2**17
"""Queries whose sums are in memory in float32 at once, where the segments' lengths allow it."""


@dataclass(frozen=True)
class LongNet(OnTrained):
    """Dilated attention.

    `segments`: w_i in tokens, `dilations`: r_i, both as lists such as 2k/4k/8k; the first dilation is 1. The defaults
    are those of the paper's language models. `weights`: whether gradients pass through α (exact) or, as in the
    authors' code, do not (detached).
    """

    segments: str = "2048/4096/8192/16384/32768"
    dilations: str = "1/2/4/6/12"
    weights: Literal["exact", "detached"] = "exact"

    name = "longnet"
    title = "Dilated attention (a trained model sees other keys than it learned to)"
    also = ("dilated-attention",)
    near = ("sparse-transformer",)
    paper = "Ding 2023, arXiv 2307.02486"
    cost = "time n, cache n (all keys are kept)"
    runs_zero_key = True

    def __post_init__(self) -> None:
        sizes, steps = self._list("segments"), self._list("dilations")
        self.require(
            len(sizes) == len(steps),
            f"there are {len(sizes)} segments and {len(steps)} dilations; set one dilation per segment",
        )
        self.require(steps[0] == 1, f"the first dilation must be 1, or some tokens see no keys; not {steps[0]}")
        for size, step in self.patterns:
            self.require(1 <= step <= size, f"a dilation must be from 1 to its segment's {size} tokens, not {step}")

    def _list(self, setting: str) -> list[int]:
        text = getattr(self, setting)
        self.require(isinstance(text, str) and bool(text), f"{setting} must be a list such as 2k/4k/8k, not {text!r}")
        return [read_size(item.strip(), f"{self.name}: {setting}") for item in text.split("/")]

    @property
    def patterns(self) -> list[tuple[int, int]]:
        """(w_i, r_i) of every pattern."""
        return list(zip(self._list("segments"), self._list("dilations"), strict=True))

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        return self.multiplicity(queries, keys, shape) > 0

    def multiplicity(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        queries, keys = queries[:, None, :, None], keys[:, None, None, :]
        heads = torch.arange(shape.heads, device=keys.device)[None, :, None, None]
        found = torch.zeros((), dtype=torch.uint8, device=keys.device)
        for size, step in self.patterns:
            same = queries.div(size, rounding_mode="floor") == keys.div(size, rounding_mode="floor")
            q_selected, k_selected = (x % size % step == heads % step for x in (queries, keys))
            found = found + (same & q_selected & k_selected).to(found.dtype)
        return found

    def ranges(self, start: int, end: int, shape: AttentionShape) -> list[tuple[int, int]]:
        sizes = self._list("segments")
        return [(min(start // w * w for w in sizes), min(shape.length, max(-(-end // w) * w for w in sizes)))]

    def visited(self, shape: AttentionShape, device: torch.device) -> float:
        """The number of visited pairs, summed over patterns and heads: a key of two patterns is visited twice."""
        return float(sum(dilated.visited(shape.length, shape.heads, *at, causal=shape.causal) for at in self.patterns))

    def run(self, call: AttentionCall, shape: AttentionShape) -> Tensor:
        """Attention (B, H, T, D) in longspan's kernels, otherwise one dense call for each pattern and offset.

        With a bias on scores or dropout it runs in blocks of queries under a mask.
        """
        if not call.plain:
            return masked_attention(self, call, shape)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))
        if not (self.weights == "detached" and learns) and refusal(call.query, call.key, call.value) is None:
            ends = None if shape.causal or call.padding is None else call.padding.sum(-1)
            return dilated_attention(
                *(call.query, call.key, call.value, self.patterns),
                causal=shape.causal,
                scale=call.scale,
                ends=ends,
                zero_key=call.zero_key,
            )

        def rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            chunks = self.chunks(query.shape[2], shape.heads, shape.causal)
            how = {"detached": self.weights == "detached", "zero_key": call.zero_key}
            return joint_attention(query, key, value, chunks, call.scale, **how)

        return by_row(rows, call.query, call.key, call.value, None if shape.causal else call.padding)

    def chunks(self, length: int, heads: int, causal: bool) -> list[Chunk]:
        """The segments in a text of `length` tokens, in chunks whose ends no segment crosses."""
        period = math.lcm(*self._list("segments"))
        step = max(1, TOKENS_AT_ONCE // period) * period
        bounds = [(start, min(start + step, length)) for start in range(0, length, step)]
        return [Chunk(start, end, self._parts(start, end, heads, causal)) for start, end in bounds]

    def _parts(self, start: int, end: int, heads: int, causal: bool) -> list[Part]:
        parts = []
        for size, step in self.patterns:
            whole = (end - start) // size
            last = start + whole * size
            for offset in range(min(step, heads)):
                some = slice(offset, None, step)
                if whole:
                    at = Lane(start + offset, size - offset, size, step)
                    parts.append(Part(whole, at, at, causal, some))
                if last + offset < end:
                    at = Lane(last + offset, end - last - offset, step=step)
                    parts.append(Part(1, at, at, causal, some))
        return parts

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        added = encoding.defines("bias") or encoding.defines("query_scores")
        if self.weights == "detached" and (added or config.attention_dropout):
            raise NotSupported(
                "weights=detached needs a position scheme that adds nothing to scores, such as rope or xpos, and "
                f"attention_dropout=0, not position={config.position} and {config.attention_dropout}; use weights=exact"
            )
        return super().build(config, layer, encoding, causal=causal)

    # On trained models.

    def reach(self, facts: ModelFacts) -> int | None:
        return None if max(self._list("segments")) <= facts.window else facts.window

    def neutral_length(self) -> int:
        """The first segment with one pattern; with several, near keys count several times from the second token on."""
        return self._list("segments")[0] if len(self.patterns) == 1 else 1

    def keys_seen(self, facts: ModelFacts, length: int) -> int:
        """The mean over tokens and heads: a share 1/r of the queries, each for a share 1/r of a segment."""
        return min(length, max(1, round(sum(min(size, length) / step**2 for size, step in self.patterns))))

    def attach(self, site: Site) -> None:
        if self.weights == "detached":
            raise NotSupported(
                f"{self.name}: weights=detached is for training a longspan model, not for a trained one; use weights=exact"
            )
        super().attach(site)
