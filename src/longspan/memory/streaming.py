"""StreamingLLM: attention sinks and a rolling window, so that a model reads without end in constant memory and time.

A query sees the first `sinks` tokens and the last `window` tokens (itself among them), at the distances that they have
inside the cache: past sinks + window tokens, the query stands at slot sinks + window - 1 and sink s at slot s. What left the
window is gone: this lengthens the stream, not what the model can remember.

Keys stay in the cache at the rotation they came with. Only the distance to the sinks must be mended, by the number of
tokens evicted before the query: with one query the few sink keys are turned forward, always from their originals, so that
nothing drifts; with many queries each query is turned back instead. So any cut of the input into chunks gives the result of
feeding it token by token.

Where the sinks' scores must join the window's in one softmax, they travel as extra channels of the head: the query carries
its score with sink s there, sink key s carries a one, and any fused kernel does the rest, with gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.engine.core import attention, expand_heads, with_zero_key
from longspan.engine.decode import single_query as one_query
from longspan.engine.slices import Slices
from longspan.engine.window import rolling_window as windowed
from longspan.hf.call import LayerCall
from longspan.hf.forward import forward_of
from longspan.hf.rolling import StreamingLayer
from longspan.hf.rotary import rotate
from longspan.hf.site import Site, layer_number
from longspan.hf.trial import prove_rotation
from longspan.memory.base import CacheReader
from longspan.util.errors import NotSupported

QUERIES_AT_ONCE = 1024
"""How many queries share one SDPA call when many come at once: bounds the mask."""


PAPER_WINDOW = 1020


@dataclass(frozen=True)
class StreamingLLM(Method):
    """`sinks` first tokens and `window` most recent tokens are kept.

    Left out, the window is the 1,020 of the paper's cache of 1,024 tokens, or what the model's own window holds
    beside the sinks where that is less.
    """

    sinks: int = 4
    window: int | None = None

    name: ClassVar[str] = "streaming"
    title: ClassVar[str] = "StreamingLLM: attention sinks and a rolling window"
    also: ClassVar[tuple[str, ...]] = ("streaming-llm", "attention-sinks", "attention-sink", "sink-cache")
    near: ClassVar[tuple[str, ...]] = ("lm-infinite", "h2o", "snapkv")
    paper: ClassVar[str] = "Xiao 2024, arXiv 2309.17453"
    seam: ClassVar[Any] = "memory"
    slots: ClassVar[frozenset[str]] = frozenset({"attention", "cache", "span"})
    cost: ClassVar[str] = "time n, cache constant"
    why_not_exportable: ClassVar[str] = "it lives in the cache, and a checkpoint only holds weights and settings"

    def __post_init__(self) -> None:
        self.require(0 <= self.sinks <= 2**16, f"sinks must be from 0 to 65,536, not {self.sinks:,}")
        self.require(1 <= self.recent <= 2**26, f"window must be at least 1 token, not {self.recent:,}")

    @property
    def recent(self) -> int:
        """The window; while no model is known, the paper's."""
        return PAPER_WINDOW if self.window is None else self.window

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        if self.window is not None:
            return self
        room = facts.window - self.sinks
        self.require(room > 0, f"sinks={self.sinks:,} leave no room in a window of {facts.window:,} tokens; take fewer")
        return replace(self, window=min(PAPER_WINDOW, room))

    def check(self, facts: ModelFacts) -> None:
        if facts.rope is None:
            raise NotSupported(
                f"streaming mends rotary distances and {facts.architecture} has no rotary positions that it can mend; "
                "use a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
            )
        if facts.rope.varies:
            raise NotSupported(
                f"streaming turns keys by differences of positions, and the frequencies of {facts.architecture} "
                f"({facts.rope.type}) are others past {facts.rope.window:,} tokens; use self-extend or window, or a checkpoint "
                "with fixed frequencies"
            )
        if other := facts.layer_types - {"full_attention", "sliding_attention"}:
            raise NotSupported(
                f"streaming keeps keys and values, and {facts.architecture} has {', '.join(sorted(other))} layers"
            )

    def reach(self, facts: ModelFacts) -> int | None:
        return None

    def neutral_length(self) -> int:
        return self.sinks + self.recent

    def cache_tokens(self, facts: ModelFacts, length: int) -> int:
        return self.sinks + self.recent

    def fixed_step(self) -> bool:
        return True

    def attach(self, site: Site) -> None:
        prove_rotation(site)
        site.state = Streaming(self, site)
        site.state.attach()


class SinkKeys:
    """The sink keys of all layers as they came, side by side, so that one rotation turns them all."""

    def __init__(self, site: Site, layers: list[StreamingLayer]):
        self.rotary = site.rotary
        self.held = layers[0].sink_keys
        groups: dict[tuple, list[nn.Module]] = {}
        for module in site.attention_modules:
            keys = layers[layer_number(module)].sink_keys
            alike = (getattr(module, "use_rope", True), site.layer_type(module), keys.device, keys.shape)
            groups.setdefault(alike, []).append(module)
        self.groups = [
            (modules, kind, torch.stack([layers[layer_number(m)].sink_keys for m in modules]).float())
            for (turns, kind, _, _), modules in groups.items()
            if turns  # layers without positions keep their sinks as they are
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """They are made again for a copy of the model."""

    def belong_to(self, layers: list[StreamingLayer]) -> bool:
        """Whether these are still the layers' keys: reordered beams have others."""
        return self.held is layers[0].sink_keys

    def turned(self, evicted: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Layer numbers and their keys (layers, B, H, sinks, D), float32, turned forward by `evicted` (B or 1, 1) positions."""
        for modules, kind, keys in self.groups:
            count, batch, _, sinks, _ = keys.shape
            shift = evicted.to(keys.device).expand(batch, sinks)
            cos, sin = self.rotary.shift_tables(shift, keys, kind)
            flat = rotate(modules[0], keys.flatten(0, 1), cos.repeat(count, 1, 1), sin.repeat(count, 1, 1))
            yield [layer_number(m) for m in modules], flat.unflatten(0, (count, batch))


@dataclass(frozen=True)
class Pass:
    """One forward: token numbers start … start + new - 1, and the rows' padding."""

    start: int
    new: int
    pad: Tensor | None
    layers: list[StreamingLayer] | None
    sink_keys: dict[int, Tensor] = field(default_factory=dict)
    """Turned sink keys of each layer, where one query decodes past the ring's filling."""
    fixed: bool = False
    """Whether this is a step of fixed shape: the ring is full, its sinks are turned, nothing is masked."""


class Streaming(CacheReader[StreamingLayer]):
    """StreamingLLM on one model: gives every forward a rolling cache and computes its attention."""

    kind = "streaming"
    layer_class = StreamingLayer

    def __init__(self, method: StreamingLLM, site: Site):
        super().__init__(method, site)
        self._sinks: WeakKeyDictionary[StreamingLayer, SinkKeys | None] = WeakKeyDictionary()
        """Of each cache, by its first layer, while it lives."""

    def attach(self) -> None:
        self.site.attention(self.attend, own_mask=True)
        self.site.before_forward(self.before_forward)

    def reading(self) -> str:
        return self.method.spec

    def new_layers(self) -> list[StreamingLayer]:
        return [StreamingLayer(self.method.sinks, self.method.recent) for _ in range(self.site.facts.layers)]

    # Before a forward: the cache, the padding, the positions.

    def before_forward(self, arguments: dict[str, Any]) -> None:
        ids = arguments.get("input_ids")
        new = (ids if ids is not None else arguments["inputs_embeds"]).shape[1]
        layers = None if self.site.drops_caches else self.cache_layers(arguments)
        start = layers[0].seen if layers else 0
        if layers and layers[0].fixed_slot is not None:
            forward_of(arguments).keep(self, Pass(start, new, None, layers, fixed=True))
            return
        self._check_positions(arguments)
        pad = self._padding(arguments.get("attention_mask"), start, new, layers)
        if arguments.get("position_ids") is None:
            device = (ids if ids is not None else arguments["inputs_embeds"]).device
            positions = torch.arange(start, start + new, device=device)[None]
            if pad is not None:  # as generate counts them, so that a cache may be filled by either
                positions = (positions - pad[:, None].to(device)).clamp(min=0)
            arguments["position_ids"] = positions
        arguments["attention_mask"] = None
        now = Pass(start, new, pad, layers)
        full = start >= self.method.sinks + self.method.recent
        if layers and new == 1 and self.method.sinks and full and start >= layers[0].settled:
            now.sink_keys.update(self._turned(now, layers, arguments["position_ids"].device))
        forward_of(arguments).keep(self, now)

    @staticmethod
    def _check_positions(arguments: dict[str, Any]) -> None:
        """Refuses several documents in one row: without a mask, positions that begin again are all that says so."""
        positions = arguments.get("position_ids")
        if positions is None or arguments.get("attention_mask") is not None or positions.shape[-1] == 1:
            return
        if bool((positions.diff(dim=-1) < 0).any()):
            raise NotSupported(
                "several documents are packed into one row, and streaming would read across them; give each document a row of "
                "its own (in a recipe: data.packing=plain or none)"
            )

    def _turned(self, now: Pass, layers: list[StreamingLayer], device: torch.device) -> dict[int, Tensor]:
        held = self._sinks.get(layers[0])
        if held is None or not held.belong_to(layers):
            held = self._sinks[layers[0]] = SinkKeys(self.site, layers)
        evicted = self._evicted(now, torch.tensor([now.start], device=device))
        return {
            number: keys
            for numbers, stack in held.turned(evicted)
            for number, keys in zip(numbers, stack.to(layers[0].keys.dtype), strict=True)
        }

    def _padding(self, mask: Any, start: int, new: int, layers: list[StreamingLayer] | None) -> Tensor | None:
        """Left-padding tokens of each row, (B,), or None where there are none; the layers are told."""
        known, settled = (layers[0].pad, layers[0].settled) if layers else (None, 2**63)
        pad = self.left_padding(mask, start, new, known, settled=settled, cached=layers is not None)
        if pad is not None and pad is not known:
            for layer in layers or ():
                layer.set_padding(pad)
        return pad

    # The attention of one layer.

    def attend(self, call: LayerCall) -> Tensor:
        now: Pass = call.forward.state(self)
        zero_key = bool(getattr(call.module, "zero_key", False))  # of a model of ours with a zero sink
        if now.fixed:
            if zero_key:
                key, value, _ = with_zero_key(call.key, call.value, None)
                call = replace(call, key=key, value=value)
            if one_query.serves(call.query, call.key, call.softcap):
                return one_query.one_query_attention(call.query, call.key, call.value, call.scale)
            return attention(call.query, call.key, call.value, None, call.scale, softcap=call.softcap)
        if now.layers and now.layers[0].in_ring(now.start, now.new, call.key):
            return self._one_query(call, now)
        sinks = min(self.method.sinks, call.key.shape[2])
        sink_keys, sink_values = call.key[:, :, :sinks], call.value[:, :, :sinks]
        if not now.layers and now.pad is not None:
            where = self._first_real(sinks, call, now.pad)
            sink_keys, sink_values = (
                x.gather(2, where.expand(-1, x.shape[1], -1, x.shape[-1])) for x in (call.key, call.value)
            )
        scores = self._sink_scores(call, now, sink_keys)
        if zero_key:
            scores, sink_values = F.pad(scores, (0, 1)), F.pad(sink_values, (0, 0, 0, 1))
        first = max(self.method.sinks, now.start - self.method.recent + 1)  # number of the first token after the sinks
        key, value = call.key[:, :, sinks:], call.value[:, :, sinks:]
        reach = min(self.method.recent, call.sliding_window or self.method.recent)
        if now.pad is None and windowed.serves(call, key, reach):
            out, lse = windowed.window_attention(call.query, key, value, now.start - first, reach, call.scale)
            return windowed.join(out, lse, scores, sink_values)
        return torch.cat(list(self._blocks(call, now, scores, sink_values, key, value, first)), dim=2)

    @staticmethod
    def _first_real(sinks: int, call: LayerCall, pad: Tensor) -> Tensor:
        index = pad[:, None] + torch.arange(sinks, device=call.key.device)
        return index.clamp(max=call.key.shape[2] - 1)[:, None, :, None]

    def _evicted(self, now: Pass, tokens: Tensor) -> Tensor:
        """How many tokens of its row were evicted before each token number: (B or 1, T)."""
        pad = 0 if now.pad is None else now.pad[:, None].to(tokens.device)
        return (tokens[None] - pad + 1 - self.method.sinks - self.method.recent).clamp(min=0)

    def _turn(self, call: LayerCall, x: Tensor, name: str, shift: Tensor) -> Tensor:
        """x rotated by `shift` more positions, float32."""
        layer_type = self.site.layer_type(call.module)
        tables = call.forward.once(
            f"{layer_type}:{name}", lambda: self.site.rotary.shift_tables(shift, x.float(), layer_type)
        )
        return rotate(call.module, x.float(), *tables)

    def _one_query(self, call: LayerCall, now: Pass) -> Tensor:
        """Decoding: the few sink keys are turned forward from their originals, inside the ring."""
        turned = now.sink_keys.get(layer_number(call.module))
        if turned is not None:
            call.key[:, :, : self.method.sinks] = turned
        mask = call.forward.once(f"ring:{call.sliding_window}", lambda: self._ring_mask(call, now))
        key, value = call.key, call.value
        if getattr(call.module, "zero_key", False):
            key, value, mask = with_zero_key(key, value, mask)
        return attention(call.query, key, value, mask, call.scale, softcap=call.softcap)

    def _ring_mask(self, call: LayerCall, now: Pass) -> Tensor | None:
        """Which slots one query sees, (B, 1, 1, slots); None when it sees them all."""
        filled, token = call.key.shape[2], now.start
        sinks, window = self.method.sinks, self.method.recent
        short = call.sliding_window is not None and call.sliding_window < sinks + window
        padded = now.pad is not None and token < now.layers[0].settled + window  # type: ignore[index]
        if not short and not padded:
            return None
        device = call.query.device
        slot = torch.arange(filled, device=device)
        age = (token - sinks - (slot - sinks)) % window  # of ring slots, in tokens before the query
        pad = torch.zeros(1, dtype=torch.long, device=device) if now.pad is None else now.pad.to(device)
        position = token - pad[:, None]  # of the query, (B, 1)
        held = position - age  # of the ring's tokens
        distance = torch.where(slot < sinks, position.clamp(max=sinks + window - 1) - slot, age)
        seen = torch.where(slot < sinks, slot <= position, (held >= sinks) & (age <= token))
        if call.sliding_window is not None:
            seen = seen & (distance < call.sliding_window)
        return seen[:, None, None]

    def _sink_scores(self, call: LayerCall, now: Pass, sink_keys: Tensor) -> Tensor:
        """Scaled scores (B, H, T, sinks) of each query, turned back by what was evicted before it, with each sink;
        -inf where the sink is not before the query."""
        tokens = torch.arange(now.start, now.start + now.new, device=call.query.device)
        evicted = call.forward.once("evicted", lambda: self._evicted(now, tokens))
        # In float32: products of 16-bit numbers may be past what 16 bits hold.
        query = self._turn(call, call.query, "queries", -evicted) if self._any_evicted(now) else call.query.float()
        scores = (query @ expand_heads(sink_keys, query.shape[1]).float().mT) * call.scale
        pad = 0 if now.pad is None else now.pad[:, None].to(tokens.device)
        position = (tokens[None] - pad)[:, None, :, None]
        slot = torch.arange(sink_keys.shape[2], device=tokens.device)
        visible = slot <= position
        if call.sliding_window is not None:
            inside = position.clamp(max=self.method.sinks + self.method.recent - 1) - slot
            visible = visible & (inside < call.sliding_window)
        return scores.masked_fill(~visible, float("-inf"))

    def _any_evicted(self, now: Pass) -> bool:
        return now.start + now.new > self.method.sinks + self.method.recent

    def _blocks(
        self, call: LayerCall, now: Pass, scores: Tensor, sink_values: Tensor, key: Tensor, value: Tensor, first: int
    ) -> Iterator[Tensor]:
        """Attention of QUERIES_AT_ONCE queries after one another over their part of the window and the sinks."""
        queries, sinks, keys, values = map(Slices, (call.query, scores, key, value))
        for begin in range(0, now.new, QUERIES_AT_ONCE):
            end = min(begin + QUERIES_AT_ONCE, now.new)
            start = now.start + begin
            left = max(0, start - self.method.recent + 1 - first)
            right = max(0, now.start + end - first)
            rows = torch.arange(start, now.start + end, device=key.device)[:, None]
            columns = torch.arange(first + left, first + right, device=key.device)[None]
            band = self._band(now, rows, columns, call.sliding_window)
            yield self._joined(
                call,
                queries[:, :, begin:end],
                sinks[:, :, begin:end],
                sink_values,
                keys[:, :, left:right],
                values[:, :, left:right],
                band,
            )

    def _band(self, now: Pass, rows: Tensor, columns: Tensor, sliding_window: int | None) -> Tensor:
        """(B or 1, 1, queries, keys): the last `window` tokens, without those that are sinks or padding of their row."""
        reach = min(self.method.recent, sliding_window or self.method.recent)
        band = (columns <= rows) & (rows - columns < reach)
        if now.pad is None:
            return band[None, None]
        pad = now.pad[:, None, None].to(rows.device)
        real = band & (columns - pad >= self.method.sinks)
        return (real | ((columns == rows) & (rows < pad)))[:, None]  # padding looks at itself: a row must see something

    def _joined(
        self,
        call: LayerCall,
        query: Tensor,
        scores: Tensor,
        sink_values: Tensor,
        key: Tensor,
        value: Tensor,
        band: Tensor,
    ) -> Tensor:
        """One softmax over sinks and window: the sinks' scores ride in extra channels, as high and low halves so that
        16-bit queries carry them exactly enough."""
        sinks = scores.shape[-1]
        if sinks == 0:
            return attention(query, key, value, band, call.scale, dropout=call.dropout, softcap=call.softcap)
        seen = torch.isfinite(scores)
        unit = (
            2.0**8 if query.dtype == torch.float16 else 1.0
        )  # float16 ends at 65,504, and its smallest numbers reach far down
        wanted = scores.masked_fill(~seen, 0.0) / (call.scale * unit)
        high = wanted.to(query.dtype)
        low = (wanted - high.float()).to(query.dtype)
        width = -(-2 * sinks // 8) * 8 - 2 * sinks  # fused kernels want widths of eights
        query = F.pad(torch.cat((query, high, low), dim=-1), (0, width))
        eye = torch.eye(sinks, dtype=key.dtype, device=key.device).repeat(1, 2) * unit
        ones = F.pad(eye, (key.shape[-1], width)).expand(*key.shape[:2], -1, -1)
        key = torch.cat((ones, F.pad(key, (0, 2 * sinks + width))), dim=2)
        joined = torch.cat((sink_values, value), dim=2)
        shape = (*seen.shape[:1], 1, *seen.shape[2:])
        visible = torch.cat((seen[:, :1].expand(shape), band.expand(seen.shape[0], -1, -1, -1)), dim=-1)
        padded = F.pad(joined, (0, key.shape[-1] - joined.shape[-1]))
        out = attention(query, key, padded, visible, call.scale, dropout=call.dropout, softcap=call.softcap)
        return out[..., : value.shape[-1]]
