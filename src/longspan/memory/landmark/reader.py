"""Landmark attention on a model: landmarks put into every forward's tokens, and taken out of what comes of it.

The caller's tokens are ordinary ones, as many as the caller counts. Before the decoder each row's real tokens are laid out by
themselves, with a landmark after every `block` of them; padding is left out, wherever it stands. After the decoder each of
the caller's tokens gets its own state, and the last one of a block its landmark's, which is what the next token is predicted
from, as in the paper, where the landmark is the token that comes before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache

from longspan.engine.retrieval import landmarks
from longspan.engine.retrieval.grouped import grouped_attention, wide
from longspan.hf.caches import Stored, cache_of_layers, filled_by
from longspan.hf.call import LayerCall
from longspan.hf.forward import Forward, counts_on, forward_of
from longspan.hf.rotary import rotate
from longspan.hf.site import Site, layer_number
from longspan.memory.base import CacheReader
from longspan.memory.landmark.cache import PageLayer, Rows
from longspan.util.errors import NotSupported

CHUNKS_AT_ONCE = 64
"""Chunks of a document that are read in one forward."""


@dataclass(frozen=True)
class Piece:
    """Queries of one chunk of each row.

    columns (B, T): which of the forward's queries; offset (B, T): their place in the chunk; first (B,), on the CPU,
    and before (B,): the chunk's first page.
    """

    columns: Tensor
    offset: Tensor
    first: Tensor
    before: Tensor
    name: str


@dataclass(frozen=True)
class Pass:
    """One forward: slots start … start + width - 1 of each row.

    start and filled (B,), on the CPU: slots in use before and after it. out (B, columns): where each of the caller's
    tokens has its state.
    """

    start: Tensor
    filled: Tensor
    width: int
    slot: Tensor
    out: Tensor
    pieces: list[Piece]
    order: Tensor | None
    """(B, W): where the queries are among those of all pieces, where not in order."""
    layers: list[PageLayer] | None
    """Those of the forward's cache, of which `rows`, `ids` and `real` become the state when the forward is over."""
    rows: Rows
    ids: Tensor
    real: Tensor
    training: bool


class LandmarkReader(CacheReader[PageLayer]):
    """Landmark attention on one model."""

    kind = "landmark"
    layer_class = PageLayer

    def __init__(self, method: Any, site: Site):
        super().__init__(method, site)
        self.layout = method.layout

    def attach(self) -> None:
        self.site.unrotate()
        self.site.attention(self._attend, own_mask=True)
        self.site.before_forward(self._begin)
        self.site.after_forward(self._end)

    # Before and after the decoder

    def _begin(self, arguments: dict[str, Any]) -> None:
        ids = arguments.get("input_ids")
        if ids is None:
            raise NotSupported(
                "landmark puts its tokens among the input's: give the model input_ids, not inputs_embeds"
            )
        if ids.shape[1] > 1 and bool((ids == self.method.id).any()):
            raise NotSupported("landmark: the input has landmarks in it already; leave them out, they are put in here")
        layers = self._layers(arguments)
        rows = layers[0].rows if layers else Rows(self.layout.block)
        real = self._real(arguments.get("attention_mask"), ids, rows)
        tokens = rows.tokens(len(ids))
        if len(tokens) != len(ids):
            raise NotSupported(f"a cache of {len(tokens)} rows does not go with {len(ids)} rows of input")
        self._check_positions(arguments.get("position_ids"), real)
        now = self._plan(tokens, real, ids, rows, layers)
        if self.site.training and now.width > self.site.facts.window:
            raise NotSupported(
                f"landmark trains with all of a text in sight, {now.width:,} tokens with landmarks, and this model's window "
                f"is {self.site.facts.window:,}; train on shorter texts, it reads longer ones afterwards"
            )
        forward_of(arguments).keep(self, now)
        arguments["input_ids"] = self._with_landmarks(now, tokens.to(ids.device))
        arguments["position_ids"], arguments["attention_mask"] = now.slot, None
        arguments.pop("cache_position", None)

    def _real(self, mask: Any, ids: Tensor, rows: Rows) -> Tensor:
        """(B, T), boolean: which of the new columns are tokens."""
        if mask is None:
            return torch.ones_like(ids, dtype=torch.bool)
        if (
            not isinstance(mask, Tensor)
            or mask.ndim != 2
            or mask.shape[1] not in (ids.shape[1], rows.seen + ids.shape[1])
        ):
            self.refuse_mask()
        return mask[:, -ids.shape[1] :].bool()

    def _check_positions(self, given: Tensor | None, real: Tensor) -> None:
        """Refuses positions that do not count a row's tokens one by one."""
        if given is not None and not counts_on(given, real):
            raise NotSupported(
                "landmark counts positions by itself, one for each token and landmark; leave position_ids out (in a recipe: "
                "positions.kind=ordinary, and data.packing=plain or none)"
            )

    def _layers(self, arguments: dict[str, Any]) -> list[PageLayer] | None:
        """The layers of this forward's cache; None in training, which reads whole texts."""
        if self.site.training:
            if arguments.get("cache") is not None:
                raise NotSupported(
                    "landmark trains on whole texts, without a cache; call model.eval() to read with one"
                )
            arguments["use_cache"] = False
            return None
        return self.cache_layers(arguments)

    def new_layers(self) -> list[PageLayer]:
        rows = Rows(self.layout.block)
        return [
            PageLayer(rows, self.layout, offloads=self.method.offload, leads=number == 0)
            for number in range(self.site.facts.layers)
        ]

    # A document that was read

    def reading(self) -> str:
        return replace(self.method, offload=False).spec

    def at_once(self, most: int | None = None) -> int:
        """Whole chunks."""
        local = self.method.local
        return int((CHUNKS_AT_ONCE if most is None else max(1, most // local)) * local)

    def copy(self, cache: Cache, rows: int) -> Cache:
        return copied(cache, torch.zeros(rows, dtype=torch.long))

    def empty_layers(self, tensors: dict[str, Tensor], numbers: list[dict[str, Any]]) -> list[Stored]:
        layers, ids = self.new_layers(), torch.atleast_2d(tensors["ids"])
        layers[0].rows.add(ids, tensors.get("real", torch.ones_like(ids)).bool())
        return cast(list[Stored], layers)

    def _plan(self, tokens: Tensor, real: Tensor, ids: Tensor, rows: Rows, layers: list[PageLayer] | None) -> Pass:
        """tokens (B,), on the CPU: how many each row has before this forward."""
        device, block = real.device, self.layout.block
        after = tokens + real.sum(1).cpu()
        start, filled = tokens + tokens // block, after + after // block
        width = max(1, int((filled - start).max()))
        begin = start.to(device)[:, None]
        slot = begin + torch.arange(width, device=device)
        number = tokens.to(device)[:, None] + real.cumsum(1) - 1
        own = number + number // block + ((number + 1) % block == 0)
        out = (own - begin).clamp(min=0)
        pieces, order = self._pieces(start, width, device)
        return Pass(start, filled, width, slot, out, pieces, order, layers, rows, ids, real, self.site.training)

    def _pieces(self, start: Tensor, width: int, device: torch.device) -> tuple[list[Piece], Tensor | None]:
        """Queries by their chunks; a row that has no more of them repeats its last one."""
        chunk, made, places = self.layout.chunk, [], []
        same = bool((start == start[0]).all())
        count = int(((start + width - 1) // chunk - start // chunk).max()) + 1
        total = 0
        order = torch.zeros(len(start), width, dtype=torch.long)
        for i in range(count):
            number = start // chunk + i
            begin = (number * chunk - start).clamp(min=0, max=width)
            end = ((number + 1) * chunk - start).clamp(max=width)
            longest = max(1, int((end - begin).max()))
            columns = (begin[:, None] + torch.arange(longest)).clamp(max=width - 1)
            offset = (start[:, None] + columns - number[:, None] * chunk).clamp(0, chunk - 1)
            first = (number * self.layout.local).minimum((start + width - 1) // chunk * self.layout.local)
            name = f"{int(offset[0, 0])} {longest}" if same else f"piece {i}"
            made.append(Piece(columns.to(device), offset.to(device), first, first.to(device), name))
            if not same:
                places.append((begin, end, total))
            total += longest
        for begin, end, at in places:
            for row, (a, b) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
                order[row, a:b] = at + torch.arange(max(b - a, 0))
        return made, None if same else order.to(device)

    def _with_landmarks(self, now: Pass, tokens: Tensor) -> Tensor:
        """(B, W): each row's new tokens and their landmarks; what is past a row's end is its first column's token, of which
        nothing is read."""
        assert self.method.id is not None, "the reader's method has its token"
        ids, slot, size = now.ids, now.slot, self.layout.size
        order = (~now.real).long().argsort(dim=1, stable=True)
        number = slot - slot // size - tokens[:, None]
        column = order.gather(1, number.clamp(0, ids.shape[1] - 1))
        return ids.gather(1, column).masked_fill(slot % size == self.layout.block, self.method.id)

    def _end(self, forward: Forward, output: Any) -> Any:
        now: Pass = forward.state(self)
        if now.layers is not None:
            now.rows.add(now.ids, now.real)
        if isinstance(output, tuple):
            return (self._own_states(now, output[0]), *output[1:])
        output.last_hidden_state = self._own_states(now, output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self._own_states(now, states) for states in output.hidden_states)
        return output

    @staticmethod
    def _own_states(now: Pass, states: Tensor) -> Tensor:
        out = now.out.to(states.device)[..., None]
        return states.gather(1, out.expand(-1, -1, states.shape[-1]))

    # Attention

    def _attend(self, call: LayerCall) -> Tensor:
        now: Pass = call.forward.state(self)
        if now.training:
            return self._all_in_sight(call)
        alone = PageLayer(Rows(self.layout.block), self.layout)
        layer = alone if now.layers is None else now.layers[layer_number(call.module)]
        with torch.autocast(call.query.device.type, enabled=False):
            return self._retrieving(call, now, layer).to(call.query.dtype)

    def _all_in_sight(self, call: LayerCall) -> Tensor:
        """The form of training (section 3.1): every page is seen, at its true distance."""
        at = torch.arange(call.query.shape[2], device=call.query.device)[None]
        cos, sin = self.site.rotary.tables(at, wide(call.query), self.site.layer_type(call.module))
        query, key = (rotate(call.module, wide(x), cos, sin).to(call.value.dtype) for x in (call.query, call.key))
        return grouped_attention(
            query, key, call.value, self.layout.block, call.scale, dropout=call.dropout, softcap=call.softcap
        )

    def _retrieving(self, call: LayerCall, now: Pass, layer: PageLayer) -> Tensor:
        size = self.layout.size
        kind = self.site.layer_type(call.module)
        like = wide(call.key)
        tables = call.forward.once(f"keys {kind}", lambda: self.site.rotary.tables(now.slot % size, like, kind))
        layer.write(rotate(call.module, like, *tables).to(call.key.dtype), call.value, now.start)
        made = [self._piece(call, layer, piece, kind) for piece in now.pieces]
        if now.layers is not None:
            layer.settle(now.filled)
        out = made[0] if len(made) == 1 else torch.cat(made, dim=2)
        if now.order is None:
            return out
        return out.gather(2, now.order.to(out.device)[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[-1]))

    def _piece(self, call: LayerCall, layer: PageLayer, piece: Piece, kind: str | None) -> Tensor:
        query = call.query.gather(
            2, piece.columns[:, None, :, None].expand(-1, call.query.shape[1], -1, call.query.shape[-1])
        )
        query = wide(query)
        positions = landmarks.query_positions(piece.offset, self.layout)
        cos, sin = call.forward.once(
            f"queries {kind} {piece.name}", lambda: self.site.rotary.tables(positions.flatten(0, 1), query, kind)
        )
        slots = len(positions)
        turned = rotate(call.module, query.repeat(slots, 1, 1, 1), cos, sin).unflatten(0, (slots, -1))
        chosen = landmarks.choose(turned, layer.landmarks, piece.before, self.layout, call.scale)
        chosen = chosen.last(min(self.layout.retrieve, int(piece.first.max())))
        here = layer.here(piece.first)
        return landmarks.attend(turned, chosen, layer.fetch, here, piece.offset, self.layout, call.scale, call.softcap)


def copied(cache: Cache, index: Tensor) -> Cache:
    """A cache with rows `index` (B',) of a landmark cache, which goes on by itself."""
    layers = cast(list[PageLayer], cache.layers)
    rows = layers[0].rows
    shared = Rows(rows.block)
    shared.add(rows.ids[index], rows.real[index])
    return cache_of_layers([layer.copied_to(shared, index) for layer in layers], filled_by(cache))
