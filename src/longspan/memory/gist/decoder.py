"""Gist tokens in a decoder: what hides the text before them, and the cache of them alone.

Where gist tokens stand is read off the input's ids, and of what a cache holds it is kept on the cache, so that `generate` needs
nothing but ids and its usual mask. In a `GistCache` there is nothing to hide: it holds the keys and values of gist tokens
only. Its tokens stand where they stood behind the prompt, which differs from row to row, so positions are moved on by the
length of each row's prompt; whoever calls the model counts as if the text began with the gist tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import decoder_of
from longspan.core.tokens import encode
from longspan.engine.core import causal_mask
from longspan.engine.retrieval.gist_masks import visible
from longspan.hf import compat
from longspan.hf.caches import Ordinary, check_rows, own_layers
from longspan.hf.call import LayerCall
from longspan.hf.forward import forward_of
from longspan.hf.trial import evaluating
from longspan.memory.base import CacheReader, LayerTensors, OnTokens, requested_cache
from longspan.memory.gist.settings import method_on
from longspan.util.errors import LongspanError, NotSupported, SpecError

_GIST, _AT = "_longspan_gist", "_longspan_at"
"""On a cache: which of its tokens are gist tokens, (B, T) boolean, where its first layer does not know that (`Ordinary.marks`),
and, of a `GistCache`, at which positions all stand."""


@dataclass(frozen=True)
class Pass:
    """One forward. All are (B, all tokens so far)."""

    gist: Tensor | None
    """Which tokens are gist tokens; None where nothing is hidden."""
    at: Tensor | None = None
    """The positions of a `GistCache`'s tokens."""
    real: Tensor | None = None
    """The mask of padding that came with them."""


class DecoderReader(CacheReader[Any]):
    """Gist tokens on one decoder."""

    kind = "gist"

    def attach(self) -> None:
        if getattr(self.site.model.base_model, "leading", 0):
            raise NotSupported(
                "gist reads off the input which tokens are in a cache, and this model puts a learned sink before them; use a "
                "model without sink=learned"
            )
        self.site.attention(self._attend)
        self.site.before_forward(self._begin)
        self.site.state = self

    def _begin(self, arguments: dict[str, Any]) -> None:
        ids = arguments.get("input_ids")
        if ids is None:
            raise NotSupported("gist finds its tokens by their ids: give the model input_ids, not inputs_embeds")
        cache, gist = self._cache(arguments), ids == self.method.id
        at = real = None
        if cache is not None:
            gist = torch.cat((_marks(cache, gist), gist), dim=1)
            _mark(cache, gist)
        if isinstance(cache, GistCache):
            at, real = cache.place(arguments, ids.shape[1]), arguments.get("attention_mask")
        hides = self.method.mode != "positive" and bool(gist.any())
        forward_of(arguments).keep(self, Pass(gist if hides else None, at, real))

    def _cache(self, arguments: dict[str, Any]) -> Cache | None:
        """The caller's; an empty one is put in where the model would make it, since the marks belong on it."""
        cache = requested_cache(self.site, arguments)
        if type(cache) is DynamicCache and not cache.get_seq_length():
            own_layers(cache, self.site.facts.layers)
        return cache

    # A prompt that was read

    separator = ""

    def reading(self) -> str:
        return f"gist:id={self.method.id}"

    def read(self, ids: Tensor, at_once: int | None = None, on_tokens: OnTokens | None = None) -> tuple[Tensor, Cache]:
        """The gist tokens' ids, and a `GistCache` of a prompt, which goes through the model in one forward."""
        self.check_compresses()
        lead = torch.full((self.method.tokens,), self.method.id)
        whole = torch.cat((ids.cpu(), lead)).to(self.model.device)[None]
        with evaluating(self.model):
            first = torch.tensor([len(ids)], device=self.model.device)
            cache = compressed(self.model, whole, torch.ones_like(whole), first, self.method.tokens)
        if on_tokens is not None:
            on_tokens(len(ids))
        return lead, cache

    def check_compresses(self) -> None:
        """Raises `NotSupported` for a control, which hides nothing or everything."""
        if self.method.mode != "gist":
            raise NotSupported(
                f"{self.method.spec} is a control that hides nothing or everything; compress with mode=gist"
            )

    def copy(self, cache: Cache, rows: int) -> Cache:
        return cast(GistCache, cache).copy(rows)

    def parts(self, cache: Cache) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        held = cast(GistCache, cache).copy()
        tensors = {"shift": held.shift}
        for number, (key, value) in enumerate(held.pairs()):
            tensors |= {f"{number}.key": key, f"{number}.value": value}
        return [{"kind": "full"}] * len(held.layers), tensors

    def ids_of(self, tensors: dict[str, Tensor]) -> Tensor:
        if "states" in tensors:
            raise LongspanError("the file holds the states of an encoder; load it with longspan.memory.gist.load")
        return torch.full((len(tensors["shift"]), tensors["0.key"].shape[2]), self.method.id)

    def restore(
        self, tensors: dict[str, Tensor], numbers: list[dict[str, Any]], tensors_of: LayerTensors, spec: str | None
    ) -> Cache:
        layers = [tensors_of(number) for number in range(len(numbers))]
        return GistCache([(one["key"], one["value"]) for one in layers], tensors["shift"].to(self.model.device))

    # Attention

    def _attend(self, call: LayerCall) -> Tensor:
        now: Pass = call.forward.state(self)
        mask = call.mask
        if now.at is not None:
            call = replace(call, keys_at=now.at[:, -call.key.shape[2] :])
            mask = self._window(call, now.real) if call.sliding_window else mask
        return self.site.own_attention(call, mask if now.gist is None else self._hiding(call, mask, now.gist))

    def _hiding(self, call: LayerCall, mask: Tensor | None, gist: Tensor) -> Tensor:
        """Boolean (B, 1, Tq, Tk): a mask without what gist tokens stand for.

        A layer with a sliding window holds the last keys only.
        """
        new, held = call.query.shape[2], call.key.shape[2]
        sees = call.forward.once("gist", lambda: visible(gist, new, self.method.mode))
        own = causal_mask(new, held, call.query.device)[None, None] if mask is None else mask
        return own & sees[:, None, :, -held:].to(own.device)

    def _window(self, call: LayerCall, real: Tensor | None) -> Tensor:
        """Boolean (B, 1, Tq, Tk): a sliding window counted in positions.

        The model's own counts columns, and padding may stand between gist tokens and a text.
        """
        assert call.sliding_window is not None
        keys, queries = call.key_positions[:, None, :], call.position_ids[:, :, None]
        near = causal_mask(call.query.shape[2], call.key.shape[2], keys.device) & (keys > queries - call.sliding_window)
        if real is not None:
            near = near & real[:, None, :].bool()
        return near[:, None]


class GistCache(DynamicCache):
    """Keys and values of gist tokens, B prompts of k each.

    `shift` (B,): the tokens of each prompt that are gone.

    `inputs` makes what `generate` takes, with a cache of its own, so one GistCache serves any number of texts. It runs only
    on a model with `gist` on it, which gives tokens their positions.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], shift: Tensor):
        super().__init__()
        self.shift = shift
        self._placed = True
        for number, (key, value) in enumerate(layers):
            self.update(key, value, number)
        key = layers[0][0]
        self.tokens = key.shape[2]
        setattr(self, _GIST, torch.ones(len(key), self.tokens, dtype=torch.bool, device=key.device))

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.shift)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(key.nbytes + value.nbytes for key, value in self.pairs())

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values, (B, H_kv, T, D)."""
        layers: list[Any] = self.layers
        return [(layer.keys, layer.values) for layer in layers]

    def copy(self, rows: int | None = None, each: int = 1) -> GistCache:
        """The gist tokens for texts to come, without what was read after them: as many rows, or the only one `rows` times, and
        every row `each` times. Nothing is copied that need not be: keys are only ever replaced, never written into."""
        rows = len(self) if rows is None else rows
        if len(self) not in (1, rows):
            raise LongspanError(f"{len(self)} prompts cannot go before {rows} texts; give one text for each prompt")
        spread = torch.arange(rows, device=self.shift.device).repeat_interleave(each) % len(self)
        pairs = [(k[:, :, : self.tokens], v[:, :, : self.tokens]) for k, v in self.pairs()]
        if len(spread) > len(self):
            pairs = [(k[spread.to(k.device)], v[spread.to(v.device)]) for k, v in pairs]
        return GistCache(pairs, self.shift[spread])

    def inputs(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str], *, beams: int = 1
    ) -> dict[str, Any]:
        """What `generate` takes to go on after the prompts: input_ids, attention_mask and a cache.

        The ids begin with the gist tokens, which are in the cache. beams: `num_beams` of that call, or its
        `num_return_sequences` where it samples.
        """
        rows = [encode(tokenizer, text) for text in ([texts] if isinstance(texts, str) else texts)]
        if not rows or not all(rows):
            raise SpecError("gist: a text to go on with is empty; give at least one token for each")
        method, width = method_on(model), max(map(len, rows))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else rows[0][0]
        lead = [method.id] * self.tokens
        ids = [[*lead, *[pad] * (width - len(row)), *row] for row in rows]
        mask = [[*[1] * self.tokens, *[0] * (width - len(row)), *[1] * len(row)] for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=model.device),
            "attention_mask": torch.tensor(mask, device=model.device),
            compat.CACHE: self.copy(len(rows), beams),
        }

    def place(self, arguments: dict[str, Any], new: int) -> Tensor:
        """Moves the positions of a forward of `new` tokens on, and returns those of all keys, (B, T)."""
        positions = arguments.get("position_ids")
        past, mask = self.get_seq_length(), arguments.get("attention_mask")
        if positions is None:
            positions = torch.arange(past, past + new, device=self.shift.device)[None]
            if mask is not None:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
        positions = arguments["position_ids"] = positions + self.shift[:, None]
        before = getattr(self, _AT, None)
        if before is None:
            before = torch.arange(self.tokens, device=positions.device) + self.shift[:, None]
        check_rows(before, positions)
        at = torch.cat((before[:, :past], positions), dim=1)
        setattr(self, _AT, at)
        self._placed = True
        return at

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Refuses a forward in which nobody has moved the positions: a model without the method would count from 0."""
        if layer_idx == 0:
            if not self._placed:
                raise NotSupported(
                    "a cache of gist tokens runs on a model with the method on it, which knows their positions: "
                    "longspan.apply(model, method) first"
                )
            self._placed = False
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._pick(torch.arange(len(self)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._pick(indices)

    def _pick(self, rows: Tensor) -> None:
        self.shift = self.shift[rows.to(self.shift.device)]
        for name in (_GIST, _AT):
            if (held := getattr(self, name, None)) is not None:
                setattr(self, name, held[rows.to(held.device)])


def _mark(cache: Cache, gist: Tensor) -> None:
    """Keeps `gist` (B, T) with the cache, where it follows the rows that are reordered or picked."""
    if cache.layers and isinstance(first := cache.layers[0], Ordinary):
        first.marks = gist
    else:
        setattr(cache, _GIST, gist)


def _marks(cache: Cache, new: Tensor) -> Tensor:
    """Which tokens of the cache are gist tokens, (B, T), for `new` (B, …) to go on with. Raises `NotSupported` for one that was
    filled without the method."""
    length = cache.get_seq_length()
    first = cache.layers[0] if cache.layers else None
    marks: Tensor | None = first.marks if isinstance(first, Ordinary) else getattr(cache, _GIST, None)
    if marks is None or marks.shape[1] < length:
        if length:
            raise NotSupported(
                "this cache was filled while gist was not on the model, so it is not known which of its tokens are gist "
                "tokens; begin with an empty one"
            )
        return new[:, :0]
    if len(new) % len(marks):
        raise NotSupported(f"a cache of {len(marks)} rows does not go with {len(new)} rows of input")
    return marks[:, :length].repeat_interleave(
        len(new) // len(marks), dim=0
    )  # shorter after a cut, more rows for beams


@torch.no_grad()
def compressed(model: PreTrainedModel, ids: Tensor, mask: Tensor, first: Tensor, count: int) -> GistCache:
    """Reads prompts (B, T) with gist tokens behind them, padded on the right, and keeps those. first (B,): the column of each
    row's first gist token."""
    cache = DynamicCache()
    decoder = decoder_of(model)
    decoder(input_ids=ids, attention_mask=mask, use_cache=True, **compat.with_cache(decoder, cache))
    places = first[:, None] + torch.arange(count, device=first.device)
    layers: list[Any] = cache.layers
    return GistCache([(_columns(layer.keys, places), _columns(layer.values, places)) for layer in layers], first)


def _columns(states: Tensor, places: Tensor) -> Tensor:
    """states (B, H, T, D) at places (B, k): (B, H, k, D)."""
    return states.take_along_dim(places.to(states.device)[:, None, :, None], dim=2)
