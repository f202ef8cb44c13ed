"""Self-Extend: exact positions near by, grouped positions far away, in one softmax; nothing is trained.

With neighbour window W and group G, a key at distance i - j < W is met at its true distance, and one further away at
floor(i/G) - floor(j/G) + W - floor(W/G). Distances stay under L up to an input of (L - W + floor(W/G))·G tokens, which is
the paper's (L - W)·G + W where G divides W.

Both kinds of score need their own rotation of query and key, so keys are cached unrotated. The fast form lays the two
rotations side by side in one head of twice the width, [near | far], with zeros in the half that a key does not use; one
SDPA call over such keys is the merged softmax, for any kernel, with gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from longspan.apply import Attend, Site
from longspan.engine.core import attention, expand_heads, reference_mix
from longspan.errors import NotSupported, SpecError
from longspan.facts import ModelFacts
from longspan.method import Method
from longspan.positions.rotary import rotate

QUERIES_AT_ONCE = 512
"""How many queries share one SDPA call: bounds the mask and the copies of keys."""


@dataclass(frozen=True)
class SelfExtend(Method):
    """`group` is G and `window` is W, in tokens; both follow from a target length."""

    group: int | None = None
    window: int | None = None

    name: ClassVar[str] = "self-extend"
    title: ClassVar[str] = "Self-Extend (LongLM)"
    paper: ClassVar[str] = "Jin 2024, arXiv 2401.01325"
    seam: ClassVar[Any] = "position"
    slots: ClassVar[frozenset[str]] = frozenset({"attention"})
    cost: ClassVar[str] = "time n² (about twice plain attention), cache n"
    why_not_exportable: ClassVar[str] = (
        "it changes the attention itself, and a checkpoint only holds weights and settings"
    )

    def __post_init__(self) -> None:
        self.require(self.group is None or self.group >= 1, f"group must be at least 1, not {self.group}")
        self.require(self.window is None or self.window >= 1, f"window must be at least 1 token, not {self.window}")

    def check(self, facts: ModelFacts) -> None:
        if facts.rope is None:
            raise NotSupported(f"self-extend regroups rotary positions and {facts.architecture} has none; use none")
        if self.window is not None and self.window >= facts.window:
            raise NotSupported(
                f"self-extend: window={self.window:,} must be shorter than the model's window of {facts.window:,} tokens; "
                f"a quarter of it, {facts.window // 4:,}, is usual"
            )
        if facts.sliding_window is not None and facts.sliding_window < facts.window and not self._hybrid(facts):
            raise NotSupported(
                f"self-extend: every layer of this model looks back {facts.sliding_window:,} tokens only, so farther "
                "positions are never met; use none, or streaming"
            )

    @staticmethod
    def _hybrid(facts: ModelFacts) -> bool:
        return facts.model_type.startswith(("gemma2", "gemma3"))

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        """W is a quarter of the window (1,024 of Llama-2's 4,096), at most 1,024; G is the smallest group, a power of two,
        that keeps the distances of the target length within two thirds of the window (the authors' rule of thumb)."""
        window = self.window or min(1024, max(1, facts.window // 4))
        if self.group is not None:
            return replace(self, window=window)
        if length is None:
            raise SpecError("self-extend needs group=… or a target length, for example self-extend:group=8,window=1024")
        room = max(1.0, facts.window * 2 / 3 - window)
        group = 1 if length <= facts.window else 2 ** math.ceil(math.log2(max(1.0, (length - window) / room)))
        return replace(self, group=group, window=window)

    def reach(self, facts: ModelFacts) -> int | None:
        assert self.group is not None and self.window is not None
        return (facts.window - self.window + self.window // self.group) * self.group

    def neutral_length(self) -> int:
        return 2**31 if self.group == 1 else (self.window or 0) + 1  # at a distance of W both forms are W

    def attach(self, site: Site) -> None:
        site.unrotate()
        site.attention(lambda call: self.attend(site, call))

    def far(self, positions: Tensor, *, query: bool) -> Tensor:
        """Grouped positions: floor(p/G), for queries moved on by W - floor(W/G)."""
        assert self.group is not None and self.window is not None
        grouped = torch.div(positions, self.group, rounding_mode="floor")
        return grouped + self.window - self.window // self.group if query else grouped

    def attend(self, site: Site, call: Attend) -> Tensor:
        layer_type = site.layer_type(call.module)

        def turn(name: str, x: Tensor, positions: Tensor) -> Tensor:
            # Layers that cache a sliding window only have fewer keys than the others.
            name = f"{layer_type}:{name}:{positions.shape[-1]}"
            tables = site.once(name, lambda: site.rotary.tables(positions, x, layer_type))
            return rotate(call.module, x, *tables)

        queries, keys = call.position_ids, call.key_positions
        near = turn("qn", call.query, queries), turn("kn", call.key, keys)
        far = (
            turn("qf", call.query, self.far(queries, query=True)),
            turn("kf", call.key, self.far(keys, query=False)),
        )
        if call.query.shape[2] == 1 or call.softcap is not None:
            return self.merged(call, near, far)
        blocks = range(0, call.query.shape[2], QUERIES_AT_ONCE)
        return torch.cat([self._block(call, near, far, start) for start in blocks], dim=2)

    def merged(self, call: Attend, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> Tensor:
        """The paper's form: both score matrices, one chosen by distance, one softmax."""
        heads = call.query.shape[1]
        scores = [(q @ expand_heads(k, heads).mT) * call.scale for q, k in (near, far)]
        distance = call.position_ids[:, None, :, None] - call.key_positions[:, None, None, :]
        merged = torch.where(distance < (self.window or 0), scores[0], scores[1])
        mask = self._visible(call, 0, call.query.shape[2])
        return reference_mix(merged, expand_heads(call.value, heads), mask, call.softcap)

    def _block(self, call: Attend, near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], start: int) -> Tensor:
        """Attention of one block of queries over keys of double width."""
        end = min(start + QUERIES_AT_ONCE, call.query.shape[2])
        seen = call.key.shape[2] - call.query.shape[2] + end
        queries = call.position_ids[:, start:end]
        keys = call.key_positions[:, :seen]
        is_near = (queries[:, None, :, None] - keys[:, None, None, :]) < (self.window or 0)
        visible = self._visible(call, start, end)[..., :seen]
        near_mask, far_mask = (visible & is_near), (visible & ~is_near)
        # Positions grow along a row, so far keys are a prefix and near keys a suffix, up to the columns that both share.
        first_near, end_far = self._split(queries, keys)
        query = torch.cat((near[0][:, :, start:end], far[0][:, :, start:end]), dim=-1)
        zeros = torch.zeros_like(near[1][:, :, :seen])
        key = torch.cat(
            (
                torch.cat((zeros[:, :, :end_far], far[1][:, :, :end_far]), dim=-1),
                torch.cat((near[1][:, :, first_near:seen], zeros[:, :, first_near:]), dim=-1),
            ),
            dim=2,
        )
        value = torch.cat((call.value[:, :, :end_far], call.value[:, :, first_near:seen]), dim=2)
        mask = torch.cat((far_mask[..., :end_far], near_mask[..., first_near:]), dim=-1)
        return attention(query, key, _pad_width(value), mask, call.scale, dropout=call.dropout)[
            ..., : call.value.shape[-1]
        ]

    def _split(self, queries: Tensor, keys: Tensor) -> tuple[int, int]:
        """(first near key, end of far keys) as column numbers that hold for every query of the block in every row."""
        window = self.window or 0
        if not bool(
            (keys.diff(dim=-1) >= 0).all()
        ):  # padding written with other positions: keep all columns in both parts
            return 0, keys.shape[1]
        near = (queries.amin(-1, keepdim=True) - keys) < window
        far = (queries.amax(-1, keepdim=True) - keys) >= window
        first_near = int(near.int().argmax(-1).min()) if bool(near.any()) else keys.shape[1]
        return first_near, int(far.sum(-1).max())

    def _visible(self, call: Attend, start: int, end: int) -> Tensor:
        if call.mask is not None:
            return call.mask[:, :, start:end]
        offset = call.key.shape[2] - call.query.shape[2]
        rows = torch.arange(start, end, device=call.query.device)[:, None] + offset
        return (torch.arange(call.key.shape[2], device=call.query.device)[None] <= rows)[None, None]


def _pad_width(value: Tensor) -> Tensor:
    """Values widened with zeros to the keys' width: fused kernels want one width."""
    return torch.nn.functional.pad(value, (0, value.shape[-1]))
