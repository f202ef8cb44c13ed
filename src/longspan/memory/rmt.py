"""Recurrent Memory Transformer (Bulatov 2022): a text of any length in segments, with a few vectors carried from one to the next.

    [memory ; segment ; memory] → the model → states at the last places are the next segment's memory       (§3.2)

Both copies carry the same vectors. The first is read by the segment; the second sees all of it and becomes what is written.
What a model knows of earlier segments is in these `tokens` vectors and nowhere else, so time is linear, memory constant, and
a model that was not trained for it knows nothing: it is tuned with `longspan train method=rmt:…`, on two segments first and then
on more (the authors' curriculum: 2, 3, … each from the weights before).

The model that comes of it is one of transformers' own kind, of type `longspan-rmt`, around the model that it was made of; it is
saved, loaded and generates like any other. A cache holds the memory and the keys and values of the segment at hand, so a
text may come in any pieces. Each row of a batch has segments of its own, which begin at its first real token.

    depth   how many segments back the gradient of a token's loss goes: 0 none, -1 all. Every token's loss goes back exactly
            as far, for which each segment is computed depth + 1 times side by side (the authors' code cuts by the number of
            segments left, so that most losses reach less far).

With activation checkpointing each segment is computed again in the backward pass, and only memories are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from longspan.core.facts import ModelFacts, text_config
from longspan.core.method import Method
from longspan.engine.patterns import roll
from longspan.hf import compat
from longspan.hf.caches import refuse_filled
from longspan.hf.forward import counts_on
from longspan.hf.heads import plain_head
from longspan.hf.site import Site
from longspan.lm.state import MixerState
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class RMT(Method):
    """`tokens` of memory, `segment` tokens of text between them, gradients through `depth` segments (-1: all)."""

    tokens: int = 10
    segment: int = 499
    depth: int = -1

    name: ClassVar[str] = "rmt"
    title: ClassVar[str] = "Recurrent Memory Transformer"
    also: ClassVar[tuple[str, ...]] = ("recurrent-memory-transformer", "recurrent-memory")
    near: ClassVar[tuple[str, ...]] = ("infini-attention",)
    paper: ClassVar[str] = "Bulatov 2022, arXiv 2207.06881; Bulatov 2023, arXiv 2304.11062"
    seam: ClassVar[Any] = "memory"
    slots: ClassVar[frozenset[str]] = frozenset({"frequencies", "attention", "queries", "span", "cache"})
    works_on: ClassVar[str] = "a trained model that is then fine-tuned"
    cost: ClassVar[str] = "time n, cache constant"
    why_not_exportable: ClassVar[str] = "it is a model around the model; longspan train saves it as one of its own type"

    def __post_init__(self) -> None:
        self.require(self.tokens >= 1, f"tokens must be at least 1, not {self.tokens}; without memory use none")
        self.require(self.segment >= 1, f"segment must be at least 1 token, not {self.segment}")
        self.require(self.depth >= -1, f"depth must be a number of segments, or -1 for all, not {self.depth}")

    def check(self, facts: ModelFacts) -> None:
        whole = self.segment + 2 * self.tokens
        self.require(
            whole <= facts.window,
            f"segment={self.segment} and twice {self.tokens} tokens of memory are {whole} together, and the model reads "
            f"{facts.window:,}; use segment={max(1, facts.window - 2 * self.tokens)}",
        )

    def reach(self, facts: ModelFacts) -> int | None:
        return None

    def cache_tokens(self, facts: ModelFacts, length: int) -> int:
        return self.segment + self.tokens

    def build_model(self, model: PreTrainedModel) -> RMTForCausalLM:
        return around(model, self)

    def attach(self, site: Site) -> NoReturn:
        raise NotSupported(
            f"rmt makes another model around {site.facts.architecture}, which must be tuned before it knows anything: longspan "
            "train with method=rmt, or longspan.memory.rmt.around(model, method) in Python"
        )


def around(model: PreTrainedModel, method: RMT) -> RMTForCausalLM:
    """A model with memory, made of `model`, whose modules it takes over.

    Raises `NotSupported` for a model that does more to its logits than its output matrix.
    """

    if plain_head(model) is None:
        raise NotSupported(
            f"rmt: {type(model).__name__} does more to its logits than its output matrix (a cap or a scale); use a model that "
            "does not, such as Llama, Qwen or SmolLM"
        )
    settings = {"tokens": method.tokens, "segment": method.segment, "depth": method.depth}
    config = RMTConfig(text_config=model.config.to_dict(), **settings)
    with torch.device("meta"):
        made = RMTForCausalLM(config)
    made.model.base, made.lm_head = model.base_model, model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings().weight
    spread = float(embeddings.detach().float().std())
    made.model.memory = nn.Parameter(torch.randn_like(embeddings[: method.tokens]) * spread)  # as the authors begin
    made.config.dtype, made.generation_config = model.dtype, model.generation_config
    return made


class RMTConfig(PreTrainedConfig):
    """`text_config` is the configuration of the model inside."""

    model_type = "longspan-rmt"
    keys_to_ignore_at_inference = compat.CACHE_NAMES

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        tokens: int = 10,
        segment: int = 499,
        depth: int = -1,
        **kwargs: Any,
    ):
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        elif isinstance(text_config, dict):
            settings = {k: v for k, v in text_config.items() if k not in ("model_type", "architectures")}
            text_config = AutoConfig.for_model(text_config["model_type"], **settings)
        self.text_config: PreTrainedConfig = text_config
        self.tokens, self.segment, self.depth = tokens, segment, depth
        for name in ("bos", "eos", "pad"):
            kwargs.setdefault(f"{name}_token_id", getattr(text_config, f"{name}_token_id", None))
        kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)


class Segments(MixerState):
    """What is carried on: for each row of the batch its memory, the cache of the segment at hand and how much of it is read.
    Rows that are as far are held together, as one `Row` of several."""

    def __init__(self, rows: list[Row]):
        super().__init__()
        self.rows = rows

    def reset(self) -> None:
        self.rows, self.seen = [], 0

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    kind = "segments"

    @classmethod
    def empty(cls, numbers: dict[str, Any]) -> Segments:
        return cls([])

    def stored_numbers(self) -> dict[str, Any]:
        return {"seen": self.seen, "filled": self.rows[0].filled}

    def stored_tensors(self) -> dict[str, Tensor]:
        """Of rows that are as far, as those of one text are."""
        row = self.rows[0]
        layers: list[Any] = row.cache.layers if row.cache is not None else []
        pairs = {
            f"{n}.{name}": x for n, one in enumerate(layers) for name, x in (("key", one.keys), ("value", one.values))
        }
        return {"memory": row.memory, **pairs}

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        row, count = Row(tensors["memory"], None, int(numbers["filled"])), len(tensors) // 2
        if count:
            row.cache = DynamicCache()
        for number in range(count):
            cast(DynamicCache, row.cache).update(tensors[f"{number}.key"], tensors[f"{number}.value"], number)
        self.rows, self.seen = [row], int(numbers["seen"])

    def _pick(self, places: list[int]) -> None:
        if len(self.rows) == 1:
            self.rows = [self.rows[0].picked(torch.tensor(places))]
        else:
            self.rows = [self.rows[place].picked(torch.tensor([0])) for place in places]

    def _batch(self) -> int:
        return sum(len(row.memory) for row in self.rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._pick(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick([place for place in range(self._batch()) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._pick(torch.arange(self._batch())[indices.cpu()].tolist())


@dataclass
class Row:
    """memory (B, tokens, hidden); cache of the `filled` tokens read since, and of the memory before them."""

    memory: Tensor
    cache: DynamicCache | None = None
    filled: int = 0

    def picked(self, places: Tensor) -> Row:
        """A copy of some rows.

        Keys are only ever replaced, never written into, so what is copied may be shared.
        """
        places = places.to(self.memory.device)
        made = Row(self.memory[places], None, self.filled)
        if self.cache is not None:
            made.cache = DynamicCache()
            layers: list[Any] = self.cache.layers
            for number, layer in enumerate(layers):
                made.cache.update(layer.keys[places], layer.values[places], number)
        return made


class RMTPreTrainedModel(PreTrainedModel):
    config: RMTConfig
    config_class = RMTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = compat.CACHE_NAMES

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RMTModel):
            nn.init.normal_(module.memory, std=getattr(self.config.text_config, "initializer_range", 0.02))


class RMTModel(RMTPreTrainedModel):
    """Final states of a text of any length."""

    def __init__(self, config: RMTConfig):
        super().__init__(config)
        self.base = AutoModel.from_config(config.text_config)
        self.memory = nn.Parameter(torch.empty(config.tokens, text_config(config).hidden_size))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """attention_mask (B, all tokens so far): padding, on either side.

        position_ids may only count a text's tokens: within a segment these stand behind the memory, and that is all
        the model has ever seen.
        """
        compat.refuse_unknown(self, kwargs)
        for what in ("output_hidden_states", "output_attentions"):
            if kwargs.get(what, getattr(self.config, what, False)):
                raise NotSupported(f"rmt reads a text segment by segment and keeps nothing for {what}; ask without it")
        past_key_values = compat.one_cache(cache, past_key_values)
        embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        self._check_positions(position_ids, attention_mask, embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if past_key_values is None:
            return BaseModelOutputWithPast(last_hidden_state=self._whole(embeds, attention_mask))
        state = self._state(past_key_values, embeds)
        mask = None if attention_mask is None else attention_mask[:, -embeds.shape[1] :]
        hidden = self._going_on(embeds, mask, state)
        state.seen += embeds.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=hidden, **compat.output_cache(past_key_values))

    @staticmethod
    def _check_positions(given: Tensor | None, mask: Tensor | None, embeds: Tensor) -> None:
        """Refuses several documents in one row, and positions that jump."""
        new = embeds.shape[1]
        if given is None or new == 1:
            return
        real = torch.ones_like(given, dtype=torch.bool) if mask is None else mask[:, -new:].bool()
        if not counts_on(given, real):
            raise NotSupported(
                "rmt counts positions by itself, from the memory on; leave position_ids out, and give each document a row of its "
                "own (in a recipe: positions.kind=ordinary, and data.packing=plain or none)"
            )

    # A text at once

    def _whole(self, embeds: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or bool(mask.all()):
            return self._recurrence(embeds, None)
        first = mask.int().argmax(1)
        return roll(self._recurrence(roll(embeds, first, 1), roll(mask, first, 1).bool()), -first, 1)

    def _recurrence(self, embeds: Tensor, real: Tensor | None) -> Tensor:
        """Rows begin at column 0.

        `memories` are the same vectors with gradients that go back 0, 1, … segments.
        """
        config = self.config
        deep = config.depth if torch.is_grad_enabled() and config.depth >= 0 else None
        memories = [self.memory.to(embeds.dtype).expand(len(embeds), -1, -1)]
        outs = []
        for start in range(0, embeds.shape[1], config.segment):
            part = embeds[:, start : start + config.segment]
            there = None if real is None else real[:, start : start + config.segment]
            if deep is not None and start:
                memories = [memories[0].detach(), *memories][: deep + 1]
            made = [self._once(memory, part, there) for memory in memories]
            outs.append(made[-1][0])
            memories = [memory for _, memory in made]
        return torch.cat(outs, dim=1)

    def _once(self, memory: Tensor, part: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            hidden, new = checkpoint(self._segment, memory, part, real, use_reentrant=False)
            return hidden, new
        return self._segment(memory, part, real)

    def _segment(self, memory: Tensor, part: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """States of the segment (B, S, hidden), and the memory after it.

        A row that is all padding keeps its memory.
        """
        count = memory.shape[1]
        inputs = torch.cat((memory, part, memory), dim=1)
        seen: dict[str, Tensor] = {}
        if real is not None:
            ones = real.new_ones(len(real), count)
            mask = torch.cat((ones, real, ones), dim=1).long()
            seen = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        hidden = self.base(inputs_embeds=inputs, use_cache=False, **seen)[0]
        new = hidden[:, -count:]
        if real is not None:
            new = torch.where(real.any(1)[:, None, None], new, memory)
        return hidden[:, count:-count], new

    # A text in pieces

    def _state(self, cache: Cache, embeds: Tensor) -> Segments:
        layers: list[Any] = cache.layers
        if layers and isinstance(layers[0], Segments) and layers[0].rows:
            return layers[0]
        refuse_filled(cache)
        state = Segments([Row(self.memory.to(embeds.dtype).expand(len(embeds), -1, -1))])
        layers[:] = [state]
        return state

    def _going_on(self, embeds: Tensor, mask: Tensor | None, state: Segments) -> Tensor:
        if mask is not None and not bool(mask.all()) and len(state.rows) == 1 and len(mask) > 1:
            state.rows = [state.rows[0].picked(torch.tensor([i])) for i in range(len(mask))]
        if len(state.rows) == 1 and (mask is None or bool(mask.all())):
            return self._read(embeds, state.rows[0])
        hidden = torch.zeros_like(embeds)
        for number, row in enumerate(state.rows):  # as far as each: one after the other
            real = slice(None) if mask is None else mask[number].bool()
            if mask is None or bool(mask[number].any()):
                hidden[number, real] = self._read(embeds[number, real][None], row)[0]
        return hidden

    def _read(self, embeds: Tensor, row: Row) -> Tensor:
        """States of new tokens without padding; `row` goes on."""
        count, outs = self.config.tokens, []
        for part in self._cut(embeds, row.filled):
            whole = row.filled + part.shape[1] == self.config.segment
            lead = row.cache is None
            inputs = [row.memory] * lead + [part] + [row.memory] * whole
            if row.cache is None:
                row.cache = DynamicCache()
            states = torch.cat(inputs, dim=1)
            hidden = self.base(inputs_embeds=states, use_cache=True, **compat.with_cache(self.base, row.cache))[0]
            outs.append(hidden[:, count * lead :][:, : part.shape[1]])
            row.filled += part.shape[1]
            if whole:
                row.memory, row.cache, row.filled = hidden[:, -count:], None, 0
        return torch.cat(outs, dim=1)

    def _cut(self, embeds: Tensor, filled: int) -> list[Tensor]:
        """The tokens up to the end of the segment at hand, and segments from there on."""
        here = min(self.config.segment - filled, embeds.shape[1])
        first, rest = embeds[:, :here], embeds[:, here:]
        return [first, *rest.split(self.config.segment, dim=1)] if rest.shape[1] else [first]


class RMTForCausalLM(RMTPreTrainedModel, GenerationMixin):
    endless = True

    def __init__(self, config: RMTConfig):
        super().__init__(config)
        self.model = RMTModel(config)
        inner = text_config(config)
        self.lm_head = nn.Linear(inner.hidden_size, inner.vocab_size, bias=False)
        if config.tie_word_embeddings:
            table = self.model.get_input_embeddings().weight
            name = next(n for n, p in self.named_parameters() if p is table)
            self._tied_weights_keys = {"lm_head.weight": name}
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels (B, T): the inputs themselves, -100 where no loss is wanted; the shift by one is made here."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=compat.one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocabulary = text_config(self.config).vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **compat.output_cache(compat.cache_of(out)))


AutoConfig.register(RMTConfig.model_type, RMTConfig, exist_ok=True)
AutoModel.register(RMTConfig, RMTModel, exist_ok=True)
AutoModelForCausalLM.register(RMTConfig, RMTForCausalLM, exist_ok=True)
