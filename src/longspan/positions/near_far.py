"""Attention with two kinds of distance: the true one for near keys, one of the method's own for far keys, in one softmax.

Both kinds of score need their own rotation of query and key, so keys are cached unrotated. The fast form lays the two
rotations side by side in one head of twice the width, [near | far], with zeros in the half that a key does not use; one
SDPA call over such keys is the merged softmax, for any kernel, with gradients.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.engine.core import attention, expand_heads, reference_mix
from longspan.engine.slices import Slices
from longspan.hf.call import LayerCall
from longspan.hf.rotary import rotate
from longspan.hf.site import Site
from longspan.util.errors import NotSupported

QUERIES_AT_ONCE = 512
"""How many queries share one SDPA call: bounds the mask and the copies of keys."""

Pair = tuple[Tensor, Tensor]


class NearFar(Method):
    """Base of the methods that keep the true distance of keys less than `window` away and change that of the others."""

    window: int | None

    slots = frozenset({"attention"})
    cost = "time n² (about twice plain attention), cache n"
    why_not_exportable = "it changes the attention itself, and a checkpoint only holds weights and settings"

    def far(self, positions: Tensor, *, query: bool) -> Tensor:
        """The places (B or 1, T) of queries or of keys whose differences are the far distances."""
        raise NotImplementedError

    def check(self, facts: ModelFacts) -> None:
        if facts.rope is None:
            raise NotSupported(
                f"{self.name} changes rotary distances and {facts.architecture} has no rotary positions that it can change; "
                "use none, or a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
            )
        if self.window is not None and self.window >= facts.window:
            raise NotSupported(
                f"{self.name}: window={self.window:,} must be shorter than the model's window of {facts.window:,} tokens; "
                f"a quarter of it, {facts.window // 4:,}, is usual"
            )
        short = facts.sliding_window is not None and facts.sliding_window < facts.window
        if short and "full_attention" not in facts.layer_types:
            raise NotSupported(
                f"{self.name}: every layer of this model looks back {facts.sliding_window:,} tokens only, so farther "
                "positions are never met; use none, or streaming"
            )

    def attach(self, site: Site) -> None:
        site.unrotate()
        site.attention(partial(self.attend, site))

    def attend(self, site: Site, call: LayerCall) -> Tensor:
        query = self._turned(site, call, "queries", call.query, call.position_ids)
        key = self._turned(site, call, "keys", call.key, call.key_positions)
        near, far = (query[0], key[0]), (query[1], key[1])
        if call.query.shape[2] == 1 or call.softcap is not None:
            return self.merged(call, near, far)
        near_slices, far_slices = ((Slices(q), Slices(k)) for q, k in (near, far))
        values = Slices(call.value)
        blocks = range(0, call.query.shape[2], QUERIES_AT_ONCE)
        return torch.cat([self._block(call, near_slices, far_slices, values, start) for start in blocks], dim=2)

    def _turned(self, site: Site, call: LayerCall, name: str, x: Tensor, positions: Tensor) -> Pair:
        """x rotated for near and for far distances. Both tables are of one call: rotary modules that choose their
        frequencies by the largest position would choose others for the far places alone. Nor is a far place, where one is
        used, past its text's end; those that are not used must not pass for a longer text."""
        layer_type, length = site.layer_type(call.module), positions.shape[-1]

        def tables() -> Pair:
            far = self.far(positions, query=name == "queries").minimum(positions.max())
            places = torch.cat((positions, far), dim=-1)
            return site.rotary.tables(places, x, layer_type)

        # Layers that cache a sliding window only have fewer keys than the others.
        cos, sin = call.forward.once(f"{layer_type}:{name}:{length}", tables)
        near, far = (
            rotate(call.module, x, *(table[:, part] for table in (cos, sin)))
            for part in (slice(0, length), slice(length, None))
        )
        return near, far

    def merged(self, call: LayerCall, near: Pair, far: Pair) -> Tensor:
        """By the definition: both score matrices, one chosen by distance, one softmax. near and far: (query, key)."""
        heads = call.query.shape[1]
        # In float32: products of 16-bit numbers may be past what 16 bits hold, and a fused kernel does not round them either.
        scores = [(q.float() @ expand_heads(k, heads).float().mT) * call.scale for q, k in (near, far)]
        distance = call.position_ids[:, None, :, None] - call.key_positions[:, None, None, :]
        merged = torch.where(distance < (self.window or 0), scores[0], scores[1])
        mask = self._visible(call, 0, call.query.shape[2])
        return reference_mix(merged, expand_heads(call.value, heads), mask, call.softcap)

    def _block(
        self, call: LayerCall, near: tuple[Slices, Slices], far: tuple[Slices, Slices], values: Slices, start: int
    ) -> Tensor:
        """Attention of one block of queries over keys of double width."""
        end = min(start + QUERIES_AT_ONCE, call.query.shape[2])
        seen = min(call.key.shape[2], call.key.shape[2] - call.query.shape[2] + end + call.ahead)
        queries = call.position_ids[:, start:end]
        keys = call.key_positions[:, :seen]
        is_near = (queries[:, None, :, None] - keys[:, None, None, :]) < (self.window or 0)
        visible = self._visible(call, start, end)[..., :seen]
        near_mask, far_mask = (visible & is_near), (visible & ~is_near)
        # Positions grow along a row, so far keys are a prefix and near keys a suffix, up to the columns that both share.
        first_near, end_far = self._split(queries, keys)
        query = torch.cat((near[0][:, :, start:end], far[0][:, :, start:end]), dim=-1)
        zeros = torch.zeros_like(near[1].x[:, :, :seen])
        key = torch.cat(
            (
                torch.cat((zeros[:, :, :end_far], far[1][:, :, :end_far]), dim=-1),
                torch.cat((near[1][:, :, first_near:seen], zeros[:, :, first_near:]), dim=-1),
            ),
            dim=2,
        )
        value = torch.cat((values[:, :, :end_far], values[:, :, first_near:seen]), dim=2)
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

    def _visible(self, call: LayerCall, start: int, end: int) -> Tensor:
        if call.mask is not None:
            return call.mask[:, :, start:end]
        offset = call.key.shape[2] - call.query.shape[2]
        rows = torch.arange(start, end, device=call.query.device)[:, None] + offset
        return (torch.arange(call.key.shape[2], device=call.query.device)[None] <= rows)[None, None]


def _pad_width(value: Tensor) -> Tensor:
    """Values widened with zeros to the keys' width: fused kernels want one width."""
    return torch.nn.functional.pad(value, (0, value.shape[-1]))
