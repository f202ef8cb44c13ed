"""Attention with true distances to near keys and other distances to far keys, in one softmax.

The two kinds of score rotate queries and keys differently, so the KV cache holds keys unrotated. The fast form concatenates both
rotations in heads of twice the width, [near | far], with zeros in the half that a key does not use: one SDPA call over such keys
is the merged softmax, in any kernel, with gradients.
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
"""Queries in one SDPA call, which bounds the mask and the copies of keys."""

Pair = tuple[Tensor, Tensor]


class NearFar(Method):
    """Base of the methods that keep distances below `window` tokens and change larger ones."""

    window: int | None

    slots = frozenset({"attention"})
    cost = "time n² (about twice plain attention), cache n"
    why_not_exportable = "it changes the attention itself, and a checkpoint only holds weights and settings"

    def far(self, positions: Tensor, *, query: bool) -> Tensor:
        """Positions (B or 1, T), of queries or of keys, whose differences are the far distances; `positions` are the true
        ones."""
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
                f"{self.name}: every layer of {facts.architecture} sees the last {facts.sliding_window:,} tokens only, so "
                "larger distances never occur; use none, or streaming"
            )

    def attach(self, site: Site) -> None:
        site.unrotate()
        site.attention(partial(self.attend, site))

    def attend(self, site: Site, call: LayerCall) -> Tensor:
        """Attention (B, H, Tq, D) of the call's queries over near and far keys."""
        query = self._rotated(site, call, "queries", call.query, call.position_ids)
        key = self._rotated(site, call, "keys", call.key, call.key_positions)
        near, far = (query[0], key[0]), (query[1], key[1])
        if call.query.shape[2] == 1 or call.softcap is not None:
            return self.merged(call, near, far)
        near_slices, far_slices = ((Slices(q), Slices(k)) for q, k in (near, far))
        values = Slices(call.value)
        blocks = range(0, call.query.shape[2], QUERIES_AT_ONCE)
        return torch.cat([self._block(call, near_slices, far_slices, values, start) for start in blocks], dim=2)

    def _rotated(self, site: Site, call: LayerCall, name: str, x: Tensor, positions: Tensor) -> Pair:
        """x (B, H, T, D) rotated for near and for far distances.

        Both tables come from one call, since some rotary modules choose their frequencies by the largest position. Far positions
        that are used are never past the end of the text; unused ones are clamped to it.
        """
        layer_type, length = site.layer_type(call.module), positions.shape[-1]

        def tables() -> Pair:
            far = self.far(positions, query=name == "queries").minimum(positions.max())
            return site.rotary.tables(torch.cat((positions, far), dim=-1), x, layer_type)

        # Layers whose cache keeps a sliding window have fewer keys than the others.
        cos, sin = call.forward.once(f"{layer_type}:{name}:{length}", tables)
        near, far = (
            rotate(call.module, x, *(table[:, part] for table in (cos, sin)))
            for part in (slice(0, length), slice(length, None))
        )
        return near, far

    def merged(self, call: LayerCall, near: Pair, far: Pair) -> Tensor:
        """Attention by definition: both score matrices, merged by distance, in one softmax.

        near and far: (query, key).
        """
        heads = call.query.shape[1]
        # In float32: products of 16-bit numbers may exceed the range of 16 bits, and fused kernels do not round them either.
        scores = [(q.float() @ expand_heads(k, heads).float().mT) * call.scale for q, k in (near, far)]
        distance = call.position_ids[:, None, :, None] - call.key_positions[:, None, None, :]
        merged = torch.where(distance < (self.window or 0), scores[0], scores[1])
        mask = self._visible(call, 0, call.query.shape[2])
        return reference_mix(merged, expand_heads(call.value, heads), mask, call.softcap)

    def _block(
        self, call: LayerCall, near: tuple[Slices, Slices], far: tuple[Slices, Slices], values: Slices, start: int
    ) -> Tensor:
        """Attention (B, H, rows, D) of one block of queries over keys of double width."""
        end = min(start + QUERIES_AT_ONCE, call.query.shape[2])
        last = min(call.key.shape[2], call.key.shape[2] - call.query.shape[2] + end + call.ahead)
        queries = call.position_ids[:, start:end]
        keys = call.key_positions[:, :last]
        is_near = (queries[:, None, :, None] - keys[:, None, None, :]) < (self.window or 0)
        visible = self._visible(call, start, end)[..., :last]
        near_mask, far_mask = (visible & is_near), (visible & ~is_near)
        # Positions grow along a row, so far keys are a prefix and near keys a suffix, up to the columns that both share.
        first_near, end_far = self._split(queries, keys)
        query = torch.cat((near[0][:, :, start:end], far[0][:, :, start:end]), dim=-1)
        zeros = torch.zeros_like(near[1].x[:, :, :last])
        key = torch.cat(
            (
                torch.cat((zeros[:, :, :end_far], far[1][:, :, :end_far]), dim=-1),
                torch.cat((near[1][:, :, first_near:last], zeros[:, :, first_near:]), dim=-1),
            ),
            dim=2,
        )
        value = torch.cat((values[:, :, :end_far], values[:, :, first_near:last]), dim=2)
        mask = torch.cat((far_mask[..., :end_far], near_mask[..., first_near:]), dim=-1)
        return attention(query, key, _pad_width(value), mask, call.scale, dropout=call.dropout)[
            ..., : call.value.shape[-1]
        ]

    def _split(self, queries: Tensor, keys: Tensor) -> tuple[int, int]:
        """(first near key, end of far keys): columns that hold for every query of the block, in every row."""
        window = self.window or 0
        if not bool((keys.diff(dim=-1) >= 0).all()):  # padding with other positions: all columns stay in both parts
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
    """Values padded with zeros to the width of the keys: fused kernels need one width."""
    return torch.nn.functional.pad(value, (0, value.shape[-1]))
