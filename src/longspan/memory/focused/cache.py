"""What Focused Transformer keeps of a text: in every layer the context at hand, in memory layers all that was before it.

Keys are kept unrotated. `get_seq_length` is what the model has seen, so that `generate` feeds only what is new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from longspan.engine.retrieval.memories import Indexes, Store
from longspan.hf.caches import CountedLayer, Owned, check_rows
from longspan.util.errors import NotSupported


class FocusedLayer(Owned, CountedLayer):
    """Keys and values of one layer: the columns from `base` on, the context of every row among them; what was before them is in
    `store`, or, in a layer without memory, gone. A row's context begins at every `local`-th of its own tokens."""

    keys: Tensor
    values: Tensor
    is_croppable = False
    kind = "focused"

    def __init__(self, local: int, memory: bool, offloaded: bool):
        super().__init__()
        self.local, self.memory, self.offloaded = local, memory, offloaded
        self.store = Store(offloaded) if memory else None
        self.seen = self.base = 0
        self.before = 0
        """`base` of what `update` returned last."""
        self.pads: tuple[int, ...] | None = None
        """Left-padding tokens of each row; None where there are none."""
        self.indexes: Indexes = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x[:, :, :0] for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes in T tokens and returns keys and values from column `before` on.

        What is kept is detached: gradients reach the tokens of this call only.
        """
        self.check_owner()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.seen:
            check_rows(self.keys, key_states)
        keys, values = (torch.cat(pair, dim=2) for pair in ((self.keys, key_states), (self.values, value_states)))
        self.before = self.base
        self.seen += key_states.shape[2]
        self.base = self._first_kept()
        cut = self.base - self.before
        if cut and self.store is not None:
            self.store.append(keys[:, :, :cut], values[:, :, :cut])
        kept = (x.detach()[:, :, cut:] for x in (keys, values))
        self.keys, self.values = (x.clone() if cut else x for x in kept)
        return keys, values

    def _first_kept(self) -> int:
        """The first column of any row's context."""
        return min(
            pad + (self.seen - pad) // self.local * self.local if self.seen > pad else self.seen
            for pad in self.pads or (0,)
        )

    def reset(self) -> None:
        self.seen = self.base = self.before = 0
        self.pads, self.indexes = None, {}
        self.store = Store(self.offloaded) if self.memory else None
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotSupported("focused: what went into memory is not taken back; generate without an assistant model")

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        if self.store is not None:
            self.store.each(change)
        if self.pads is not None:
            self.pads = tuple(change(torch.tensor(self.pads)).tolist())
        self.indexes = {}

    # Copies and files

    def copied(self, rows: Tensor) -> Self:
        made = type(self)(self.local, self.memory, self.offloaded)
        made.seen, made.base, made.before, made.pads = self.seen, self.base, self.before, self.pads
        made.filled_by = self.filled_by
        if self.is_initialized:
            made.lazy_initialization(self.keys, self.values)
            made.keys, made.values = self.keys, self.values
        made.store = self.store and self.store.copy()
        if not torch.equal(rows, torch.arange(self.batch_size())):
            made.batch_select_indices(rows)
        return made

    def stored_numbers(self) -> dict[str, Any]:
        return {"local": self.local, "memory": self.memory, "seen": self.seen}

    def stored_tensors(self) -> dict[str, Tensor]:
        stored = self.store.whole() if self.store else None
        far = {} if stored is None else {"memory.key": stored[0], "memory.value": stored[1]}
        return {"key": self.keys, "value": self.values, **far}

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        key, value = tensors["key"], tensors["value"]
        self.lazy_initialization(key, value)
        self.keys, self.values = key, value
        self.seen = int(numbers["seen"])
        self.base = self.seen - key.shape[2]
        if self.store is not None and self.base:
            self.store.append(tensors["memory.key"], tensors["memory.value"])

    @property
    def settings(self) -> str:
        return f"contexts of {self.local:,} tokens, {'with' if self.memory else 'without'} memory"

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens kept, wherever they are."""
        parts = self.store.parts() if self.store else []
        stored = sum(x[:, :, :size].nbytes for pair, size in parts for x in pair)
        return stored + self.keys.nbytes + self.values.nbytes
