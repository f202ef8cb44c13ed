"""Focused Transformer (Tworkowski 2023): a few layers see all that was read before, and are trained to find in it.

A text is read in contexts of `local` tokens. Every layer sees the context at hand; the memory layers see, in the same softmax,
all earlier contexts' keys and values too, or the `k` keys with the highest inner products (section 3.1). No gate: one softmax.

    positions   first   a key of the memory stands where the first token of the local context stands, that is, unrotated; the
                        query and the local keys count from there. So LongLLaMA, section 4 and the authors' `rotate_as_if_first`
                first is what a pretrained model takes; `none` uses no positions in memory layers at all, local keys among
                        them, as the paper's small models do, for a model that is trained so

Memory layers are `layers`, such as 6/12/18; left out, they are the quarters of the model's depth, as in LongLLaMA: 6, 12, 18 of
26 layers and 8, 16, 24 of 32.

In training (section 3.2, crossbatch) a query meets `d` contexts beside its own: the one before it in its own document, the
positive, and those in the same place of d - 1 other documents of the batch, the negatives. Nothing says which is which, and
gradients go through all their keys and values. `late` is what `d` is from step `after` on: the paper begins with few and ends
with many. The loss is that of next tokens.

Contexts begin at every `local`-th token of a row, so that a text may come in any pieces, and a full context is followed by an
empty one, as in the authors' code. That code reads the last 1,024 tokens of a prompt as a context of their own, so that an
answer would hang on how the prompt was cut; it is left out, and so is its mixing of numbers of negatives within a batch.

    ls.apply(model, "focused:local=2k")
    model.generate(**tokenizer(book + question, return_tensors="pt"))     # memory/focused/document.py keeps the book
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.core.training_setup import TrainingSetup
from longspan.engine.core import attention
from longspan.engine.patterns import roll
from longspan.engine.retrieval import crossbatch, memories
from longspan.engine.retrieval.top import need_faiss
from longspan.engine.slices import Slices
from longspan.hf.call import LayerCall
from longspan.hf.compat import CACHE
from longspan.hf.forward import forward_of
from longspan.hf.rotary import rotate
from longspan.hf.site import Site, layer_number, site_of
from longspan.hf.trial import prove_rotation
from longspan.memory.base import AT_ONCE, CacheReader
from longspan.memory.focused.cache import FocusedLayer
from longspan.util.errors import NotSupported, SpecError


@dataclass(frozen=True)
class Focused(Method):
    """`local` tokens of context, memory in `layers`, of which `k` keys are picked (none: all are seen). `d`, `late` and `after`
    are for training."""

    local: int | None = None
    layers: str | None = None
    k: int | None = None
    search: Literal["torch", "faiss"] = "torch"
    positions: Literal["first", "none"] = "first"
    offload: bool = False
    d: int = 2
    late: int | None = None
    after: int | None = None

    name: ClassVar[str] = "focused"
    title: ClassVar[str] = "Focused Transformer"
    also: ClassVar[tuple[str, ...]] = ("focused-transformer", "fot", "longllama", "crossbatch")
    near: ClassVar[tuple[str, ...]] = ("memorizing-transformers",)
    paper: ClassVar[str] = "Tworkowski 2023, arXiv 2307.03170"
    seam: ClassVar[Any] = "memory"
    slots: ClassVar[frozenset[str]] = frozenset({"attention", "span", "cache"})
    works_on: ClassVar[str] = "pretrained; better when it is then fine-tuned"
    cost: ClassVar[str] = "time n² and cache n in a few layers, n and constant in the others"
    why_not_exportable: ClassVar[str] = (
        "it lives in the attention and the cache, and a checkpoint only holds weights and settings; longspan train saves a model "
        "that has it on"
    )

    def __post_init__(self) -> None:
        for name in ("local", "k", "d", "late", "after"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        self.require(
            (self.late is None) == (self.after is None),
            "late is what d becomes from step after on: give both, such as d=2,late=64,after=1000, or neither",
        )
        self.require(
            self.search == "torch" or self.k is not None,
            "search=faiss looks for the best keys, and without k all are seen; give k=128, or leave search out",
        )
        self.chosen()

    def chosen(self) -> tuple[int, ...]:
        """The numbers in `layers`, in order."""
        if self.layers is None:
            return ()
        parts = self.layers.split("/")
        self.require(
            all(p.isdecimal() and len(p) < 6 for p in parts),
            f"layers are numbers from 0, such as 6/12/18, not {self.layers!r}",
        )
        return tuple(sorted({int(p) for p in parts}))

    def check(self, facts: ModelFacts) -> None:
        if facts.rope is None:
            raise NotSupported(
                f"focused counts positions from the local context, and {facts.architecture} has no rotary positions that it can "
                "count so; use a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
            )
        if other := facts.layer_types - {"full_attention", "sliding_attention"}:
            raise NotSupported(
                f"focused keeps keys and values, and {facts.architecture} has {', '.join(sorted(other))} layers"
            )
        if facts.rope.varies and (self.local or facts.window) > facts.rope.window:
            raise NotSupported(
                f"focused counts positions within a context, and the frequencies of {facts.architecture} ({facts.rope.type}) are "
                f"others past {facts.rope.window:,} tokens; use local={facts.rope.window} or less, or self-extend"
            )
        wrong = [n for n in self.chosen() if n >= facts.layers]
        self.require(
            not wrong, f"there is no layer {wrong[:1] and wrong[0]}: the model has layers 0 to {facts.layers - 1}"
        )
        self.require(
            self.local is None or self.local <= facts.window,
            f"local={self.local} is more than the {facts.window:,} tokens that the model reads; use local={facts.window}",
        )
        if self.search == "faiss":
            need_faiss()

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        step = max(1, facts.layers // 4)
        quarters = [n for n in (step, 2 * step, 3 * step) if n < facts.layers] or [0]
        return replace(
            self,
            local=self.local or facts.window,
            layers=self.layers or "/".join(map(str, quarters)),
        )

    def reach(self, facts: ModelFacts) -> int | None:
        return None

    def neutral_length(self) -> int:
        return self.local or 1 if self.positions == "first" else 0

    def cache_tokens(self, facts: ModelFacts, length: int) -> int:
        """Of all layers on average; what is offloaded is not counted."""
        made = self.resolve(facts, length)
        assert made.local is not None
        held = min(length, made.local)
        share = 0 if self.offload else len(made.chosen())
        return held + (length - held) * share // facts.layers

    def keys_seen(self, facts: ModelFacts, length: int) -> int:
        made = self.resolve(facts, length)
        assert made.local is not None
        held = min(length, made.local)
        far = min(length - held, self.k or length)
        return held + far * len(made.chosen()) // facts.layers

    def contexts(self, step: int) -> int:
        """d at a step of training, from 0."""
        return self.late if self.late is not None and self.after is not None and step >= self.after else self.d

    def check_training(self, setup: TrainingSetup, facts: ModelFacts) -> None:
        """Refuses samples without text before a context, batches with too few documents, and positions that are counted anew."""
        assert self.local is not None, "resolve() has filled it in"
        if setup.length <= self.local:
            raise SpecError(
                f"data.length={setup.length}: focused learns from what is before a context of {self.local} tokens; use "
                f"data.length={2 * self.local}, or a smaller local"
            )
        most = max(self.d, self.late or 0)
        if setup.batch < most:
            raise SpecError(
                f"{self.spec}: {most} contexts are of as many documents, and {setup.batch} are read at once; use "
                f"training.micro_batch={most}, or a smaller d"
            )
        if setup.positions != "ordinary" or setup.packing == "boundaries":
            raise SpecError(
                "focused counts positions within its contexts; use positions.kind=ordinary and data.packing=plain or none"
            )

    def training_callbacks(self, model: PreTrainedModel) -> list[TrainerCallback]:
        """Tells the method which step a training is at, for `late`."""
        return [Steps(reader_of(model))]

    def attach(self, site: Site) -> None:
        zero = any(getattr(m, "zero_key", False) for m in site.model.modules())
        if zero or int(getattr(site.model.base_model, "leading", 0)):  # type: ignore[call-overload]
            raise NotSupported(
                "focused puts memory before a context, where this model has a sink; use one without sink="
            )
        prove_rotation(site)
        site.state = Reader(self, site)
        site.state.attach()


@dataclass(frozen=True)
class Pass:
    """One forward: its cache, its padding, and in training which tokens are real."""

    layers: list[FocusedLayer] | None
    pads: tuple[int, ...] | None
    training: bool
    real: Tensor | None = None
    """In training: (B, T) boolean, False where a row is filled up at its end; None without a mask."""
    shortest: int = 0
    """Tokens of its shortest row."""
    shift: Tensor | None = None
    """The pads as a tensor, in training."""
    step: int = 0
    """Of the training."""


class Reader(CacheReader[FocusedLayer]):
    """Focused Transformer on one model: gives every forward its cache, and computes its attention."""

    kind = "focused"
    layer_class = FocusedLayer

    def __init__(self, method: Focused, site: Site):
        assert method.local is not None, "resolve() has filled it in"
        super().__init__(method, site)
        self.local = method.local
        self.memory_layers = frozenset(method.chosen())
        self.step = 0
        """Of the training, for `late`."""

    def attach(self) -> None:
        self.site.unrotate()
        self.site.attention(self._attend, own_mask=True)
        self.site.before_forward(self._begin)

    # Before a forward: the cache and the padding.

    def _begin(self, arguments: dict[str, Any]) -> None:
        given = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
        new = given.shape[1]
        layers = self._cache(arguments)
        start = layers[0].seen if layers else 0
        mask = arguments.get("attention_mask")
        pads = self._padding(mask, start, new, layers)
        training = self.site.training and start == 0
        real = mask.bool() if mask is not None and training else None
        shift = None
        if real is not None and pads is not None:
            shift = torch.tensor(pads, device=given.device)
            real = roll(real, shift, 1)
        shortest = new if real is None else int(real.sum(1).min())
        for layer in layers or ():
            layer.pads = pads
        forward_of(arguments).keep(self, Pass(layers, pads, training, real, shortest, shift, self.step))
        arguments["attention_mask"] = None
        self._positions(arguments, start, new, mask, given.device)

    def _positions(
        self, arguments: dict[str, Any], start: int, new: int, mask: Tensor | None, device: torch.device
    ) -> None:
        """Contexts are counted by tokens: positions that do anything but go on are refused."""
        given = arguments.get("position_ids")
        if given is None:
            arguments["position_ids"] = torch.arange(start, start + new, device=device)[None]
        elif new > 1:
            step = given[:, 1:] - given[:, :-1]
            wrong = step != 1 if mask is None else (step != 1) & mask[:, start + 1 : start + new].bool()
            real = torch.ones_like(wrong) if mask is None else mask[:, start : start + new - 1].bool()
            if bool((wrong & real).any()):
                raise NotSupported(
                    "focused counts a row's tokens by itself, and these positions jump; leave position_ids out, and give each "
                    "document a row of its own"
                )

    def _cache(self, arguments: dict[str, Any]) -> list[FocusedLayer] | None:
        """The layers of this forward's cache; None in training, which reads whole rows."""
        if self.site.drops_caches:
            return None
        if self.site.training and arguments.get("cache") is None:
            arguments["use_cache"] = False  # or the memory of a row would stand in for crossbatch
            return None
        if self.site.training and torch.is_grad_enabled():
            raise NotSupported(
                "focused trains on whole rows, by crossbatch, and a cache holds parts; leave "
                f"{CACHE} out, or call model.eval()"
            )
        return self.cache_layers(arguments)

    def new_layers(self) -> list[FocusedLayer]:
        offload = self.method.offload
        return [FocusedLayer(self.local, n in self.memory_layers, offload) for n in range(self.site.facts.layers)]

    def reading(self) -> str:
        method = self.method
        return f"local={method.local},layers={method.layers},k={method.k},positions={method.positions}"

    def stays_on_cpu(self, name: str) -> bool:
        return bool(self.method.offload) and name.startswith("memory.")

    def at_once(self, most: int | None = None) -> int:
        """Whole contexts."""
        return max(1, (most or AT_ONCE) // self.local) * self.local

    def _padding(self, mask: Any, start: int, new: int, layers: list[FocusedLayer] | None) -> tuple[int, ...] | None:
        """Left-padding tokens of each row, as far as has been read; None where there are none."""
        pads = layers[0].pads if layers else None
        known = None if pads is None else torch.tensor(pads)
        found = self.left_padding(mask, start, new, known, settled=max(pads or (0,)) + 1, cached=layers is not None)
        if found is None or found is known:
            return None if found is None else pads
        return tuple(found.tolist())

    # The attention of one layer.

    def _attend(self, call: LayerCall) -> Tensor:
        now: Pass = call.forward.state(self)
        number = layer_number(call.module)
        layer = now.layers[number] if now.layers else None
        if now.training:
            return self._trained(call, now, number in self.memory_layers)
        if now.pads is None:
            return self._rows(call, slice(0, len(call.query)), 0, layer)
        outs = [
            self._rows(call, slice(row, row + 1), pad, layer) for row, pad in enumerate(now.pads)
        ]  # contexts of its own
        return torch.cat([F.pad(out, (0, 0, call.query.shape[2] - out.shape[2], 0)) for out in outs])

    def _rows(self, call: LayerCall, rows: slice, pad: int, layer: FocusedLayer | None) -> Tensor:
        """Attention of rows whose text begins at column `pad`: (rows, H, T, D), T the tokens behind it."""
        base = layer.before if layer else 0
        first = base + call.key.shape[2] - call.query.shape[2]
        query = call.query[rows, :, max(0, pad - first) :]
        key, value = (x[rows, :, max(0, pad - base) :] for x in (call.key, call.value))
        begin, held = max(0, first - pad), max(0, base - pad)
        if not query.shape[2]:
            return query
        memory = layer_number(call.module) in self.memory_layers
        if not memory and begin % self.local == 0 and query.shape[2] > self.local:
            return self._many(call, query, key[:, :, begin - held :], value[:, :, begin - held :])
        indexes: memories.Indexes = layer.indexes if layer else {}
        outs = []
        queries, keys, values = Slices(query), Slices(key), Slices(value)
        for at, end in self._contexts(begin, begin + query.shape[2]):
            start = at // self.local * self.local
            q = self._turn(call, queries[:, :, at - begin : end - begin], at - start, memory)
            k = self._turn(call, keys[:, :, start - held : end - held], 0, memory)
            v = values[:, :, start - held : end - held]
            if memory and start:
                late = keys[:, :, : start - held], values[:, :, : start - held]
                earlier = memories.Earlier(layer.store if layer else None, rows, pad, late, start, indexes)
                outs.append(self._remember(call, q, k, v, earlier))
            else:
                outs.append(self._near(call, q, k, v))
        return torch.cat(outs, dim=2)

    def _contexts(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The tokens begin … end - 1, cut where contexts begin."""
        cuts = [begin, *range((begin // self.local + 1) * self.local, end, self.local), end]
        return list(itertools.pairwise(cuts))

    def _remember(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor, earlier: memories.Earlier) -> Tensor:
        how: dict[str, Any] = {"softcap": call.softcap, "far": self._first(call, q), "window": call.sliding_window}
        if self.method.k is None:
            return memories.attend(q, k, v, earlier, call.scale, **how)
        return memories.attend_nearest(q, k, v, earlier, self.method.k, call.scale, search=self.method.search, **how)

    def _many(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Whole contexts of a layer without memory, from a context's beginning on, in one call; the last may be short."""
        whole = query.shape[2] // self.local * self.local
        parts = [self._side_by_side(call, *(x[:, :, :whole] for x in (query, key, value)))]
        if whole < query.shape[2]:
            q, k = (self._turn(call, x[:, :, whole:], 0, False) for x in (query, key))
            v = value[:, :, whole:]
            parts.append(self._near(call, q, k, v))
        return torch.cat(parts, dim=2)

    def _side_by_side(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (-1, self.local)).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        q, k = (self._turn(call, x, 0, False) for x in (q, k))
        out = self._near(call, q, k, v)
        return out.unflatten(0, (len(query), -1)).transpose(1, 2).flatten(2, 3)

    def _near(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within a context, in a layer with a sliding window within that too."""
        new, held, window = q.shape[2], k.shape[2], call.sliding_window
        narrow = window is not None and window < held
        mask = memories.within(new, held, window, q.device) if narrow else None
        causal = mask is None and new > 1
        return attention(q, k, v, mask, call.scale, dropout=call.dropout, softcap=call.softcap, causal=causal)

    def _turn(self, call: LayerCall, x: Tensor, at: int, memory: bool) -> Tensor:
        """x (B, H, T, D) rotated to the places at … at + T - 1 of a context."""
        if memory and self.method.positions == "none":
            return x
        tables = self._tables(call, x)
        cos, sin = (t[:, at : at + x.shape[2]] for t in tables)
        return rotate(call.module, x, cos, sin)

    def _tables(self, call: LayerCall, like: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of all places of a context, made once a forward."""
        layer_type = self.site.layer_type(call.module)

        def made() -> tuple[Tensor, Tensor]:
            return self.site.rotary.tables(torch.arange(self.local, device=like.device)[None], like, layer_type)

        return call.forward.once(f"{layer_type}:{like.device}", made)

    def _first(self, call: LayerCall, x: Tensor) -> Tensor:
        """x (B, H, T, D) as if all of it stood at place 0: what is left of that rotation is the factor of scaled models (YaRN),
        which a score takes from the query and from the key. Stored keys lack it, so it is put on the query a second time."""
        if self.method.positions == "none":
            return x
        cos, sin = (t[:, :1] for t in self._tables(call, x))
        return rotate(call.module, x, cos, sin)

    # Training.

    def _trained(self, call: LayerCall, now: Pass, memory: bool) -> Tensor:
        """Every row is read from its first token on: crossbatch in the memory layers."""
        if now.shift is not None:
            query, key, value = (roll(x, now.shift, 2) for x in (call.query, call.key, call.value))
            out = self._crossed(replace(call, query=query, key=key, value=value), now, memory)
            return roll(out, -now.shift, 2)
        return self._crossed(call, now, memory)

    def _crossed(self, call: LayerCall, now: Pass, memory: bool) -> Tensor:
        """The same for rows that begin at the first column."""
        if not memory:
            return self._many(call, call.query, call.key, call.value)
        parts, count = [], call.query.shape[2]
        queries, keys, values = Slices(call.query), Slices(call.key), Slices(call.value)
        for start, end in self._contexts(0, count):
            part = slice(start, end)
            q, k = (self._turn(call, x[:, :, part], 0, True) for x in (queries, keys))
            earlier = slice(start - self.local, start) if start else slice(0, 0)
            real = now.real if now.shortest < start else None  # what fills a row up at its end, no query sees
            others = crossbatch.Others(
                self._first(call, keys[:, :, earlier]),
                values[:, :, earlier],
                self.method.contexts(now.step) if start else 1,
                None if real is None else real[:, earlier],
            )
            here = None if real is None else real[:, part]
            how: dict[str, Any] = {"dropout": call.dropout, "softcap": call.softcap, "window": call.sliding_window}
            parts.append(crossbatch.attend(q, k, values[:, :, part], others, here, call.scale, **how))
        return torch.cat(parts, dim=2)


class Steps(TrainerCallback):
    """Tells the method which step a training is at."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reader.step = state.global_step


def reader_of(model: PreTrainedModel) -> Reader:
    """The method on a model, as it runs. Raises `NotSupported` where it is not on."""
    state = getattr(site_of(model), "state", None)
    if not isinstance(state, Reader):
        raise NotSupported('this model has no memory: longspan.apply(model, "focused") first')
    return state
