"""The cache of landmark attention: pages of `block` tokens and their landmark, on the device or in the CPU's memory.

    Rows     which columns of the caller's text are real tokens: each row's text is laid out by itself, so that
             padding takes no place in any page
    PageLayer  one layer's pages. Keys are stored turned by their place within the page

Of a layer that `offloads` the device holds the landmarks' keys and the pages of the chunk at hand. The others lie in the CPU's
memory; those that queries ask for are fetched, each once, while the chunk's own scores are made, and what the last query
asked for stays on the device for the next one, which asks for much the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engine.retrieval.landmarks import Layout, Pages
from longspan.hf.caches import CountedLayer, Owned
from longspan.util.errors import NotSupported

KEPT = 256
"""Fetched pages of a layer, over all rows and heads, up to which they stay on the device for the next query."""


class Rows:
    """What the rows of a cache hold.

    real (B, columns), boolean, and ids (B, columns), both on the CPU.
    """

    def __init__(self, block: int):
        self.block = block
        self.ids = torch.zeros(0, 0, dtype=torch.long)
        self.real = torch.zeros(0, 0, dtype=torch.bool)

    @property
    def seen(self) -> int:
        """Columns of the caller's text so far."""
        return self.ids.shape[1]

    def tokens(self, rows: int) -> Tensor:
        """(B,): each row's real tokens so far, in a batch of so many rows."""
        return self.real.sum(1) if self.seen else torch.zeros(rows, dtype=torch.long)

    def add(self, ids: Tensor, real: Tensor) -> None:
        """Takes in new columns."""
        ids, real = ids.cpu(), real.cpu()
        before = (self.ids, self.real) if self.seen else (ids[:, :0], real[:, :0])
        self.ids, self.real = torch.cat((before[0], ids), dim=1), torch.cat((before[1], real), dim=1)

    def pick(self, rows: Tensor) -> None:
        if self.seen:
            self.ids, self.real = self.ids[rows.cpu()], self.real[rows.cpu()]

    def cut(self, columns: int) -> None:
        """Forgets the last columns."""
        self.ids, self.real = self.ids[:, : self.seen - columns], self.real[:, : self.real.shape[1] - columns]


class PageLayer(Owned, CountedLayer):
    """Pages of one layer, in slots: token i of a row is in slot i + i // block, and slot block of each page is its landmark's.

    keys and values (B, H_kv, slots, D) are those on the device, from each row's page `base` (B,) on; landmarks
    (B, H_kv, pages, D) are of all pages. `rows` is shared by the layers of a cache, and changed by the one that `leads`.
    """

    keys: Tensor
    values: Tensor
    landmarks: Tensor
    is_croppable = True
    kind = "pages"

    def __init__(self, rows: Rows, layout: Layout, *, offloads: bool = False, leads: bool = False):
        super().__init__()
        self.rows, self.layout, self.offloads, self.leads = rows, layout, offloads, leads
        self.base = torch.zeros(0, dtype=torch.long)
        self.far: Pages | None = None
        """Pages from 0 to each row's base, (B, H_kv, pages, size, D), in the CPU's memory."""
        self._far_is_shared = False
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        """Fetched pages that stay: which (sorted), their keys and their values."""

    # Taking in tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        with torch.inference_mode(False):  # what is written in place must not belong to one inference mode
            self.keys = key_states.new_zeros(batch, heads, 0, width)
            self.values = value_states.new_zeros(batch, heads, 0, value_states.shape[-1])
            self.landmarks = key_states.new_zeros(batch, heads, 0, width)
        self.base = torch.zeros(batch, dtype=torch.long)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pages:
        """Gives the new states back as they came: the attention puts them in by `write`, when it has turned the keys."""
        self.check_owner()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def write(self, keys: Tensor, values: Tensor, start: Tensor) -> None:
        """Puts in turned keys and values (B, H_kv, W, D) from each row's slot `start` (B,), on the CPU, on. What came with
        gradients keeps them until the next call."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values, self.landmarks = (x.detach() for x in (self.keys, self.values, self.landmarks))
        size, width = self.layout.size, keys.shape[2]
        inside = start - self.base * size
        self._reserve(int(inside.max()) + width, int(start.max()) + width)
        if bool((inside == inside[0]).all()):
            first = int(inside[0])
            self.keys[:, :, first : first + width] = keys
            self.values[:, :, first : first + width] = values
        else:
            at = (inside[:, None] + torch.arange(width)).to(keys.device)[:, None, :, None]
            self.keys.scatter_(2, at.expand_as(keys), keys)
            self.values.scatter_(2, at.expand_as(values), values)
        self._note_landmarks(start, width)

    def _note_landmarks(self, start: Tensor, width: int) -> None:
        """Copies the last slot of every page that may have been written; that of one that is not full is written again."""
        size = self.layout.size
        page = (start // size)[:, None] + torch.arange((width - 1) // size + 2)  # (B, pages)
        held = self.keys.shape[2] // size
        inside = (page - self.base[:, None]).clamp(max=held - 1)
        slots = (inside * size + self.layout.block).to(self.keys.device)[:, None, :, None]
        marks = self.keys.gather(2, slots.expand(-1, *self.keys.shape[1:2], -1, self.keys.shape[-1]))
        at = page.to(self.keys.device)[:, None, :, None].expand_as(marks)
        self.landmarks.scatter_(2, at, marks)

    def _reserve(self, slots: int, all_slots: int) -> None:
        """Makes room for so many slots on the device, and for the landmarks of so many in all; both at least double."""
        size = self.layout.size
        if (pages := -(-slots // size)) * size > self.keys.shape[2]:
            pages = max(pages, min(2 * self.keys.shape[2] // size, pages + 4096 // size))
            more = pages * size - self.keys.shape[2]
            self.keys, self.values = _longer(self.keys, more), _longer(self.values, more)
        if (pages := all_slots // size + 2) > self.landmarks.shape[2]:
            more = max(pages, self.landmarks.shape[2] * 5 // 4) - self.landmarks.shape[2]
            self.landmarks = _longer(self.landmarks, more)

    # Giving them out

    def here(self, first: Tensor) -> Pages:
        """Keys and values (B, H_kv, local, size, D) of a chunk that begins with page `first` (B,), on the CPU. What lies
        past the last page repeats it."""
        size, local = self.layout.size, self.layout.local
        held, inside = self.keys.shape[2] // size, first - self.base
        pages = tuple(x.unflatten(2, (-1, size)) for x in (self.keys, self.values))
        if bool((inside == inside[0]).all()) and int(inside[0]) + local <= held:
            begin = int(inside[0])
            keys, values = (x[:, :, begin : begin + local] for x in pages)
            return keys, values
        at = (inside[:, None] + torch.arange(local)).clamp(max=held - 1).to(self.keys.device)
        row = torch.arange(len(at), device=at.device)[:, None]
        keys, values = (x[row, :, at].transpose(1, 2) for x in pages)
        return keys, values

    def fetch(self, page: Tensor) -> Callable[[], Pages]:
        """What waits for keys and values (B, H, T, k, size, D) of pages (B, H, T, k), heads being those of queries."""
        batch, heads = self.keys.shape[:2]
        size = self.layout.size
        held = self.keys.shape[2] // size
        head = torch.arange(page.shape[1], device=page.device) // (page.shape[1] // heads)
        line = (torch.arange(batch, device=page.device)[:, None] * heads + head)[:, :, None, None]
        tables = tuple(x.view(-1, size, x.shape[-1]) for x in (self.keys, self.values))
        if self.far is None:
            inside = line * held + page
            return lambda: (tables[0][inside], tables[1][inside])
        base = self.base.to(page.device)[:, None, None, None]
        inside, away = line * held + (page - base).clamp(min=0), page < base
        wanted = line * self.far[0].shape[2] + page
        asked = torch.unique(wanted[away])
        place = torch.searchsorted(asked, wanted).clamp(max=max(len(asked) - 1, 0))

        def arrived() -> Pages:
            there = self._brought(asked)
            keys, values = (
                torch.where(away[..., None, None], far[place] if len(far) else near[inside], near[inside])
                for far, near in zip(there, tables, strict=True)
            )
            return keys, values

        return arrived

    def _brought(self, asked: Tensor) -> Pages:
        """Pages of the CPU's memory by their numbers, which are sorted: (pages, size, D)."""
        assert self.far is not None
        lines = [x.view(-1, *x.shape[3:]) for x in self.far]
        if self._kept is None:
            keys, values = (_to_device(x, asked.cpu(), self.keys.device) for x in lines)
        else:
            known, *kept = self._kept
            at = torch.searchsorted(known, asked).clamp(max=len(known) - 1)
            new = known[at] != asked
            missing = asked[new].cpu()
            keys, values = (
                old[at].masked_scatter(new[:, None, None], _to_device(x, missing, self.keys.device))
                for old, x in zip(kept, lines, strict=True)
            )
        self._kept = (asked, keys, values) if 0 < len(asked) <= KEPT else None
        return keys, values

    # The CPU's memory

    def settle(self, filled: Tensor) -> None:
        """Where it `offloads`: moves pages of chunks that are over into the CPU's memory.

        filled (B,), on the CPU: slots in use.
        """
        size = self.layout.size
        base = filled // size // self.layout.local * self.layout.local
        if not self.offloads or bool((base <= self.base).all()):
            return
        self._kept = None
        self._reserve_far(int(base.max()))
        assert self.far is not None
        room = int((filled - base * size).max()) // size + 1
        held = self.keys.shape[2] // size
        for far, near in zip(self.far, (self.keys, self.values), strict=True):
            pages = near.detach().unflatten(2, (-1, size))
            for row, (old, new) in enumerate(zip(self.base.tolist(), base.tolist(), strict=True)):
                far[row, :, old:new] = pages[row, :, : new - old].to(far.device)
        at = ((base - self.base)[:, None] + torch.arange(room)).clamp(max=held - 1).to(self.keys.device)
        line = torch.arange(len(at), device=at.device)[:, None]
        with torch.inference_mode(False):
            self.keys, self.values = (
                x.detach().unflatten(2, (-1, size))[line, :, at].transpose(1, 2).flatten(2, 3).contiguous()
                for x in (self.keys, self.values)
            )
        self.base = base

    def _reserve_far(self, pages: int) -> None:
        """Room for so many pages, of this cache's own."""
        batch, heads = self.keys.shape[:2]
        held = 0 if self.far is None else self.far[0].shape[2]
        if pages <= held and not self._far_is_shared:
            return
        pages = max(pages, held * 5 // 4 if self.far is not None and pages > held else held)
        pinned = self.keys.is_cuda
        made = []
        with torch.inference_mode(False):
            for near in (self.keys, self.values):
                shape = (batch, heads, pages, self.layout.size, near.shape[-1])
                made.append(torch.empty(shape, dtype=near.dtype, pin_memory=pinned))
        for i, room in enumerate(made):
            if self.far is not None:
                room[:, :, :held] = self.far[i]
        self.far, self._far_is_shared = (made[0], made[1]), False

    # What transformers asks of a layer

    def get_seq_length(self) -> int:
        return self.rows.seen

    def reset(self) -> None:
        if self.leads:
            self.rows.cut(self.rows.seen)
        self.is_initialized, self.far, self._kept = False, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove columns."""
        if tokens_to_remove > 0:
            raise NotSupported("landmark cache: crop takes a negative number, of the tokens to forget")
        if self.leads:
            self.rows.cut(-tokens_to_remove)
        tokens = self.rows.tokens(len(self.base))
        if bool((tokens + tokens // self.layout.block < self.base * self.layout.size).any()):
            raise NotSupported(
                "landmark: tokens whose pages went to the CPU's memory cannot be cut off again; use offload=false"
            )

    def _select(self, rows: Tensor) -> None:
        """Goes on with these rows of what there is."""
        if self.leads:
            self.rows.pick(rows)
        if not self.is_initialized:
            return
        with torch.inference_mode(False):
            at = rows.to(self.keys.device)
            self.keys, self.values, self.landmarks = (x[at] for x in (self.keys, self.values, self.landmarks))
            self.base, self._kept = self.base[rows.cpu()], None
            if self.far is not None:
                self.far = (self.far[0][rows.cpu()], self.far[1][rows.cpu()])
                self._far_is_shared = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.base)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(len(self.base))[indices.cpu()])

    # Copies and files

    def copied_to(self, rows: Rows, index: Tensor) -> PageLayer:
        """A layer of its own with rows `index` of this one.

        Pages in the CPU's memory are shared where the rows are the same.
        """
        made = PageLayer(rows, self.layout, offloads=self.offloads, leads=self.leads)
        made.dtype, made.device, made.is_initialized = self.dtype, self.device, True
        made.filled_by = self.filled_by
        at = index.to(self.keys.device)
        with torch.inference_mode(False):
            made.keys, made.values, made.landmarks = (x[at] for x in (self.keys, self.values, self.landmarks))
        made.base = self.base[index]
        same = torch.equal(index, torch.arange(len(self.base)))
        if self.far is not None:
            made.far = self.far if same else (self.far[0][index], self.far[1][index])
            made._far_is_shared = self._far_is_shared = same
        return made

    def whole(self, filled: Tensor) -> Pages:
        """All keys and values (B, H_kv, slots, D), on the CPU, for a file."""
        made = []
        for i, near in enumerate((self.keys, self.values)):
            room = torch.zeros(*near.shape[:2], int(filled.max()), near.shape[-1], dtype=near.dtype)
            for row, (base, end) in enumerate(
                zip((self.base * self.layout.size).tolist(), filled.tolist(), strict=True)
            ):
                if self.far is not None and base:
                    room[row, :, :base] = self.far[i][row].flatten(1, 2)[:, :base]
                room[row, :, base:end] = near[row, :, : end - base].cpu()
            made.append(room)
        return made[0], made[1]

    def stored_numbers(self) -> dict[str, Any]:
        return {}

    def stored_tensors(self) -> dict[str, Tensor]:
        tokens = self.rows.tokens(len(self.base))
        keys, values = self.whole(tokens + tokens // self.layout.block)
        return {"key": keys, "value": values}

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The tokens of `rows` must be there already."""
        tokens = self.rows.tokens(0)
        self.write(tensors["key"], tensors["value"], torch.zeros_like(tokens))
        self.settle(tokens + tokens // self.layout.block)

    @property
    def settings(self) -> str:
        where = "the CPU's memory" if self.offloads else "the device"
        return f"{self.layout}, blocks in {where}"

    @property
    def nbytes(self) -> int:
        """Bytes, on the device and in the CPU's memory."""
        return self.device_bytes + self.far_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes on the device."""
        kept = () if self._kept is None else self._kept[1:]
        return sum(x.nbytes for x in (self.keys, self.values, self.landmarks, *kept)) if self.is_initialized else 0

    @property
    def far_bytes(self) -> int:
        """Bytes in the CPU's memory."""
        return sum(x.nbytes for x in self.far or ())


def _longer(x: Tensor, more: int) -> Tensor:
    with torch.inference_mode(False):
        return F.pad(x.detach(), (0, 0, 0, more))


def _to_device(x: Tensor, at: Tensor, device: torch.device) -> Tensor:
    """Rows of a tensor in the CPU's memory, gathered there and sent in one piece."""
    if device.type == "cpu":
        return x[at]
    room = torch.empty(len(at), *x.shape[1:], dtype=x.dtype, pin_memory=True)
    torch.index_select(x, 0, at, out=room)
    return room.to(device, non_blocking=True)
