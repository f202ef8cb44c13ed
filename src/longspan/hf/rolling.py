"""The rolling cache: a few first tokens and a ring of the latest ones, of one size however much is read.

`get_seq_length` is what the model has seen, not what is kept, so positions go on past evictions and `generate` feeds only
what is new. A layer returns keys in the rotation they came with; the distance to the sinks is the caller's to mend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from longspan.hf.caches import CountedLayer, Owned, check_rows
from longspan.util.errors import NotSupported


class StreamingLayer(Owned, CountedLayer):
    """Keys and values of one layer: `sinks` slots, then a ring of `window` slots; token t ≥ sinks lives in slot
    sinks + (t - sinks) mod window. `get_seq_length` is the number of tokens seen, so positions go on past evictions."""

    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    is_croppable = True
    kind = "rolling"

    def __init__(self, sinks: int, window: int):
        super().__init__()
        self.sinks, self.window = sinks, window
        self.seen = 0
        self.pad: Tensor | None = None
        """How many left-padding tokens each row starts with, (B,); None where there are none."""
        self.settled = 0
        """The token number from which every row has begun and has its sinks."""
        self.fixed_slot: Tensor | None = None
        """Where a step of fixed shape writes, (1,); `longspan.reading.stream_decoder` sets it and keeps the count."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        batch, heads, _, width = key_states.shape
        size = self.sinks + self.window
        with torch.inference_mode(False):  # what is written in place must not belong to one inference mode
            self.keys = key_states.new_zeros(batch, heads, size, width)
            self.values = value_states.new_zeros(batch, heads, size, value_states.shape[-1])
            self.sink_keys = key_states.new_zeros(batch, heads, self.sinks, width)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes in T tokens and returns what they may look at: for one token the ring as it lies, its sinks still to be
        turned; for more the original sinks, the window in order of time, and the new tokens. What is kept is detached:
        gradients reach the tokens of this call only."""
        if self.fixed_slot is not None:
            self.keys.index_copy_(2, self.fixed_slot, key_states)
            self.values.index_copy_(2, self.fixed_slot, value_states)
            return self.keys, self.values
        self.check_owner()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        check_rows(self.keys, key_states)
        start, new = self.seen, key_states.shape[2]
        ring = self.in_ring(start, new, key_states)
        old = None if ring else self._slots(max(self.sinks, start - self.window + 1), start)
        window = None if old is None else (self.keys[:, :, old], self.values[:, :, old])
        sinks = self._keep_sinks(key_states, value_states)
        self._write(key_states.detach(), value_states.detach())
        self.seen += new
        if window is None:
            filled = min(self.seen, self.sinks + self.window)
            return self.keys[:, :, :filled], self.values[:, :, :filled]
        if start == 0 and self.pad is None:
            return key_states, value_states
        fresh = max(0, self.sinks - start)
        keys = torch.cat((sinks[0], window[0], key_states[:, :, fresh:]), dim=2)
        values = torch.cat((sinks[1], window[1], value_states[:, :, fresh:]), dim=2)
        return keys, values

    def in_ring(self, start: int, new: int, key: Tensor) -> bool:
        """Whether a call is answered from the ring as it lies: one token without gradients, after all rows' sinks."""
        return new == 1 and not key.requires_grad and start >= self.settled

    def set_padding(self, pad: Tensor) -> None:
        """pad (B,): how many left-padding tokens each row starts with, as far as has been read."""
        self.pad = pad
        self.settled = int(pad.max()) + max(self.sinks, 1)

    def _slots(self, start: int, end: int) -> Tensor:
        """Ring slots of tokens start … end - 1, all of them past the sinks."""
        tokens = torch.arange(start, max(start, end), device=self.device)
        return self.sinks + (tokens - self.sinks) % self.window

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Puts the newest tokens that fit into the ring."""
        end = self.seen + keys.shape[2]
        first = max(self.seen, self.sinks, end - self.window)
        while first < end:  # once, and once more where the ring's end is crossed
            slot = self.sinks + (first - self.sinks) % self.window
            count = min(end - first, self.sinks + self.window - slot)
            part = slice(first - self.seen, first - self.seen + count)
            self.keys[:, :, slot : slot + count] = keys[:, :, part]
            self.values[:, :, slot : slot + count] = values[:, :, part]
            first += count

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Fills the sink slots from the first real tokens of each row, as they come.

        Returns the sinks' keys and values, with gradients to those that came just now. `sink_keys` is another tensor
        whenever what it holds is another.
        """
        start, new = self.seen, keys.shape[2]
        held = self.sink_keys, self.values[:, :, : self.sinks]
        if self.sinks == 0 or start >= max(self.settled, self.sinks):
            return held
        offset = keys.new_zeros(1, dtype=torch.long) if self.pad is None else self.pad.to(keys.device)
        index = (
            offset[:, None] + torch.arange(self.sinks, device=keys.device) - start
        )  # (B or 1, sinks), into the new tokens
        arrives = ((index >= 0) & (index < new))[:, None, :, None]
        where = index.clamp(0, new - 1)[:, None, :, None].expand(keys.shape[0], keys.shape[1], -1, -1)
        sink_keys, sink_values = (
            torch.where(arrives, source.gather(2, where.expand(-1, -1, -1, source.shape[-1])), old)
            for old, source in zip((held[0], held[1].clone()), (keys, values), strict=True)
        )
        self.sink_keys = self.keys[:, :, : self.sinks] = sink_keys.detach()
        self.values[:, :, : self.sinks] = sink_values.detach()
        return sink_keys, sink_values

    def reset(self) -> None:
        self.seen, self.settled = 0, 0
        self.pad = None
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()
            self.sink_keys = torch.zeros_like(self.sink_keys)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens, which is possible as long as nothing has been evicted."""
        if tokens_to_remove == 0:
            return
        if tokens_to_remove > 0:
            raise NotSupported("rolling cache: crop takes a negative number, of the tokens to forget")
        if self.seen > self.sinks + self.window:
            raise NotSupported(
                "rolling cache: tokens that left the window cannot be brought back; assisted decoding needs full attention"
            )
        self.seen += tokens_to_remove

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            with torch.inference_mode(False):
                self.keys, self.values, self.sink_keys = (change(x) for x in (self.keys, self.values, self.sink_keys))
                self.pad = None if self.pad is None else change(self.pad)

    def stored_numbers(self) -> dict[str, Any]:
        return {"sinks": self.sinks, "window": self.window, "seen": self.seen, "settled": self.settled}

    def stored_tensors(self) -> dict[str, Tensor]:
        used = min(self.seen, self.sinks + self.window)
        tensors = {"key": self.keys[:, :, :used], "value": self.values[:, :, :used], "sink_key": self.sink_keys}
        return tensors if self.pad is None else {**tensors, "pad": self.pad}

    @classmethod
    def empty(cls, numbers: dict[str, Any]) -> Self:
        return cls(int(numbers["sinks"]), int(numbers["window"]))

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        key, value = tensors["key"], tensors["value"]
        self.lazy_initialization(key, value)
        with torch.inference_mode(False):
            self.keys[:, :, : key.shape[2]], self.values[:, :, : key.shape[2]] = key, value
            self.sink_keys = tensors["sink_key"].clone()
        self.seen, self.settled, self.pad = int(numbers["seen"]), int(numbers["settled"]), tensors.get("pad")

    @property
    def settings(self) -> str:
        return f"{self.sinks} + {self.window:,} tokens"


class WindowLayer(StreamingLayer):
    """The same for patterns, which ask which tokens the keys are that `update` returned."""

    kind = "rolling window"
    columns: Tensor | None = None
    """(B or 1, keys): the number of each key's token, counted from the row's first column; -1 where a slot repeats another
    or holds nothing. None after the first call, whose keys are all tokens as they came."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, new = self.seen, key_states.shape[2]
        ring = self.in_ring(start, new, key_states)
        keys, values = super().update(key_states, value_states)
        if start == 0:
            self.columns = None
            return key_states, value_states
        self.columns = self._columns(start, ring, keys.shape[2])
        return keys, values

    def _columns(self, start: int, ring: bool, count: int) -> Tensor:
        if ring:
            slots = torch.arange(self.sinks, count, device=self.device)
            later = self.seen - 1 - (self.seen - 1 - slots) % self.window
        else:
            first = max(self.sinks, start - self.window + 1)
            later = torch.arange(first, max(first, self.seen), device=self.device)
        pad = torch.zeros(1, dtype=torch.long, device=self.device) if self.pad is None else self.pad.to(self.device)
        sinks = pad[:, None] + torch.arange(min(self.sinks, count), device=self.device)
        sinks = sinks.masked_fill(sinks >= self.seen, -1)
        repeated = later[None] < pad[:, None] + self.sinks
        return torch.cat((sinks, later.expand(len(pad), -1).masked_fill(repeated, -1)), dim=1)

    def see_padding(self, padding: Tensor | None, new: int) -> None:
        """padding (B, tokens so far), True where a token is real, before `update` takes in `new` of them: where rows begin."""
        if padding is None or (new == 1 and self.seen >= max(1, self.settled)):
            return
        pad = (padding.cumsum(-1) == 0).sum(-1)
        if self.pad is not None or bool((pad > 0).any()):
            self.set_padding(pad)


def streaming_cache(layers: int, sinks: int = 4, window: int = 1020) -> Cache:
    """A rolling cache for a model of `layers` layers with `StreamingLLM(sinks, window)` on it."""
    return Cache(layers=[StreamingLayer(sinks, window) for _ in range(layers)])
