"""The models of `longspan.lm`: a stack of layers under any position scheme, and heads on it, as transformers' Llama has them.

A stack has one `PositionEncoding`, which all layers share. A scheme that changes nothing within attention leaves it to any
`attn_implementation`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from longspan.engine.core import ending_at
from longspan.hf import compat
from longspan.hf.compat import FORWARD
from longspan.lm.attention import SCHEME, consecutive
from longspan.lm.base import HANDED, Full
from longspan.lm.configuration import LongspanConfig
from longspan.lm.layers import LongspanAttention, LongspanLayer
from longspan.lm.packed import packed, put_back, texts_in
from longspan.lm.reversible import reversible
from longspan.lm.sink import LED, SinkToken
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported


class LongspanPreTrainedModel(PreTrainedModel):
    """Base of the models: choice of the attention implementation, initialisation, what transformers asks of a model."""

    config: LongspanConfig
    config_class = LongspanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongspanLayer"]
    _skip_keys_device_placement = compat.CACHE_NAMES
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = [".ssm."]  # poles of state spaces
    _can_record_outputs = {"hidden_states": LongspanLayer, "attentions": LongspanAttention}

    def __init__(self, config: LongspanConfig):
        if config._attn_implementation is None:
            with torch.device("meta"):  # to know what it changes
                encoding = config.build_position_encoding(causal=config.kind != "encoder")
            attentions = config.attentions + config.attentions_of(causal=True)
            ours = not encoding.plain or config.sink == "zero" or not all(isinstance(a, Full) for a in attentions)
            config._attn_implementation = SCHEME if ours else None
        super().__init__(config)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        if enable and self.config.reversible:
            raise NotSupported(
                "reversible layers store no activations, so gradient checkpointing has nothing to drop; use either "
                "reversible=true or gradient checkpointing"
            )
        super()._set_gradient_checkpointing(enable, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PositionEncoding):
            module.reset_parameters()
        elif hasattr(module, "draw_weights"):
            module.draw_weights()  # type: ignore[operator]
        else:
            super()._init_weights(module)


class LongspanModel(LongspanPreTrainedModel):
    """Embeddings and a stack of layers, of a decoder or an encoder; kind and layers: by default the configuration's."""

    def __init__(self, config: LongspanConfig, *, kind: str | None = None, layers: int | None = None):
        super().__init__(config)
        self.kind = kind or config.kind
        if self.kind == "encoder-decoder":
            raise NotSupported(
                "kind=encoder-decoder has two stacks, and this is one; use LongspanForConditionalGeneration"
            )
        self.causal = self.kind != "encoder"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.place = config.build_position_encoding(causal=self.causal)
        cross = self.kind == "decoder with cross-attention"
        self.layers = nn.ModuleList(
            LongspanLayer(config, i, self.place, causal=self.causal, cross=cross)
            for i in range(layers or config.num_hidden_layers)
        )
        self.attentions = config.attentions_of(causal=self.causal)
        for attention in dict.fromkeys(self.attentions):
            attention.join(self)
        if config.sink == "zero":
            self._check_zero_sink()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.sink == "learned":
            self.sink = SinkToken(config.hidden_size, config.initializer_range)
            self.sink.attach(self)
        if config.rope_parameters is not None:
            self.rotary_emb = LongspanRotaryEmbedding(config)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        encoder_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states (B, T, hidden) and the KV cache, which goes by either name, `cache` or `past_key_values`.

        position_ids (B or 1, T); attention_mask (B, tokens so far), or for full attention a boolean mask of pairs. Raises
        `NotSupported` for arguments that the model's scheme or attention cannot use.
        """
        compat.refuse_unknown(self, kwargs, "global_attention_mask", LED, HANDED)
        kwargs.pop(LED, None)
        past_key_values = compat.one_cache(cache, past_key_values)
        if self._checkpointing:
            past_key_values, use_cache = None, False
        self._check_arguments(input_ids, inputs_embeds, kwargs)
        embeds: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None and self.causal and not self._going_back:
            past_key_values = DynamicCache(config=self.config)
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if packed(position_ids, attention_mask) and not (self.causal and all(a.takes_mask for a in self.attentions)):
            self._check_packed(cached, encoder_states, kwargs)
            return self._apart(embeds, cast(Tensor, position_ids), kwargs)
        inputs = self._layer_inputs(embeds, attention_mask, position_ids, past_key_values, cached)
        inputs |= {"encoder_states": encoder_states, "encoder_mask": None, **kwargs}
        if encoder_attention_mask is not None:
            inputs["encoder_mask"] = encoder_attention_mask[:, None, None].bool()
        hidden = self.dropout(self.place.embed(embeds, inputs["position_ids"]))
        if self.config.reversible:
            hidden = self._reversible(hidden, inputs)
        else:
            for layer in self.layers:
                hidden = layer(hidden, **inputs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **compat.output_cache(past_key_values))

    def _check_arguments(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, kwargs: dict[str, Any]) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, and not both")
        if kwargs.get("global_attention_mask") is not None and not any(a.takes_globals for a in self.attentions):
            raise NotSupported(
                f"attention={self.config.attention} has no global tokens, so global_attention_mask has no effect; leave it "
                "out, or train with attention=longformer"
            )

    def _layer_inputs(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cached: int,
    ) -> dict[str, Any]:
        """What every layer is called with besides the hidden states; cached: tokens in the cache."""
        positions = self._positions(position_ids, attention_mask, cached, embeds)
        self._check_reach(positions, cached + embeds.shape[1])
        in_order = self._in_order(attention_mask, positions, cache, embeds.shape[1])
        mask, padding = None, None
        if not in_order:
            mask, padding = self._masks(attention_mask, embeds, cache, position_ids, cached)
        pair_bias = None
        if self.place.defines("pair_bias"):
            pair_bias = self.place.pair_bias(positions, ending_at(positions, cached + embeds.shape[1]))
        return {
            "attention_mask": mask,
            "rotation": self.rotary_emb(embeds, positions) if hasattr(self, "rotary_emb") else None,
            "past_key_values": cache,
            "position_ids": positions,
            "pair_bias": pair_bias,
            "padding": padding,
            "in_order": in_order,
        }

    def _apart(self, embeds: Tensor, positions: Tensor, kwargs: dict[str, Any]) -> BaseModelOutputWithPast:
        """Final states of rows of several texts, each text read by itself.

        There is no cache: several texts cannot go on.
        """
        positions = positions.expand(embeds.shape[:2])
        shared = {k: v for k, v in kwargs.items() if not isinstance(v, Tensor) or v.shape[:2] != embeds.shape[:2]}
        parts = []
        for texts in texts_in(positions):
            by_text = {k: texts.take(v) for k, v in kwargs.items() if k not in shared}
            if FORWARD in kwargs:
                by_text[FORWARD] = kwargs[FORWARD].part(texts.take(positions))
            out = self.forward(
                inputs_embeds=texts.take(embeds),
                attention_mask=texts.real.long(),
                position_ids=texts.take(positions),
                use_cache=False,
                return_dict=True,
                **{**shared, **by_text},
            )
            parts.append((texts, out.last_hidden_state))
        return BaseModelOutputWithPast(last_hidden_state=put_back(parts, len(embeds)))

    def _check_packed(self, cached: int, encoder_states: Tensor | None, kwargs: dict[str, Any]) -> None:
        why = ""
        if cached:
            why = "a KV cache continues one text"
        elif encoder_states is not None:
            why = "an encoder's states belong to one text"
        elif any(kwargs.get(k, getattr(self.config, k, False)) for k in ("output_hidden_states", "output_attentions")):
            why = "hidden states and attentions of every layer are returned for whole rows only"
        if why:
            raise NotSupported(
                f"position_ids pack several texts into one row, and {why}; pass one text per row, with an attention_mask"
            )

    @property
    def leading(self) -> int:
        """The number of tokens that the model adds before a text."""
        return int(hasattr(self, "sink"))

    def _check_zero_sink(self) -> None:
        for layer in self.layers:
            if type(layer.self_attn) is not LongspanAttention:
                spec = self.config.attention if self.config.memory == "none" else self.config.memory
                raise NotSupported(
                    f"sink=zero changes the softmax of full, window, local and longnet, and {spec} computes attention by "
                    "itself; use one of these, or sink=learned, which works with every attention"
                )

    @property
    def _checkpointing(self) -> bool:
        """Whether gradient checkpointing recomputes layers in this pass, which would fill a cache twice."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    @property
    def _going_back(self) -> bool:
        """Whether reversible layers recompute activations in this pass."""
        return self.config.reversible and self.training and torch.is_grad_enabled()

    def _reversible(self, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        if not self._going_back:
            a = b = hidden
            for layer in self.layers:
                hidden, a, b = layer(a, b, **inputs)
            return hidden
        if inputs["past_key_values"] is not None:
            raise NotSupported(
                "reversible layers run twice in training, which would fill a cache twice; train without a cache, or with "
                "reversible=false"
            )
        for what in ("output_hidden_states", "output_attentions"):
            if inputs.get(what, getattr(self.config, what, False)):
                raise NotSupported(f"reversible layers store nothing for {what} in training; use evaluation mode")
        branches = [branch for layer in self.layers for branch in cast(LongspanLayer, layer).branches()]
        parameters = [*self.layers.parameters(), *self.place.parameters()]
        a, b = reversible(branches, hidden, parameters, inputs)
        return (a + b) / 2

    def _in_order(self, mask: Tensor | None, positions: Tensor, cache: Cache | None, new: int) -> bool:
        """Whether a bias by distance needs no mask: no padding, no packed texts, and every token so far in the cache."""
        if not self.place.defines("bias") or not all(type(a) is Full for a in self.attentions):
            return False
        hides = mask is not None and (mask.ndim != 2 or not bool(mask.all()))
        if self.config._attn_implementation != SCHEME or hides:
            return False
        if cache is not None and cache.get_mask_sizes(new, 0) != (cache.get_seq_length() + new, 0):
            return False
        return consecutive(positions)

    def _masks(
        self,
        attention_mask: Tensor | None,
        embeds: Tensor,
        cache: Cache | None,
        position_ids: Tensor | None,
        cached: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The mask (new tokens × all tokens) for layers that take it, and the padding (B, tokens so far) for the others."""
        mask: Any = None
        padding = None
        if any(a.takes_mask for a in self.attentions):
            if self.causal:
                mask = create_causal_mask(self.config, embeds, attention_mask, cache, position_ids)
            else:
                mask = create_bidirectional_mask(self.config, embeds, attention_mask)
        if not all(a.takes_mask for a in self.attentions):
            self._check_no_pairs(attention_mask)
            if attention_mask is not None and not bool(attention_mask.all()):
                padding = attention_mask.bool()
                if (short := cached + embeds.shape[1] - padding.shape[1]) > 0:  # a mask of the new tokens alone
                    padding = nn.functional.pad(padding, (short, 0), value=True)
        return mask, padding

    def _check_no_pairs(self, mask: Tensor | None) -> None:
        if mask is not None and mask.ndim != 2:
            raise NotSupported(
                f"attention={self.config.attention} takes a padding mask (batch, tokens), not one of {mask.ndim} dimensions; use "
                "attention=full for masks of pairs"
            )

    def _positions(self, position_ids: Tensor | None, mask: Tensor | None, cached: int, embeds: Tensor) -> Tensor:
        """Positions (B or 1, T).

        With a padding mask each row's first real token is at 0, whichever side the padding is on.
        """
        if position_ids is not None:
            return position_ids
        if mask is not None and mask.ndim == 2 and mask.shape[1] == cached + embeds.shape[1]:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, cached:]
        return torch.arange(cached, cached + embeds.shape[1], device=embeds.device)[None]

    def _check_reach(self, positions: Tensor, length: int) -> None:
        reach = self.place.reach
        if reach is not None and (length > reach or positions.shape[0] > 1) and int(positions.max()) >= reach:
            raise NotSupported(
                f"position={self.config.position} has {reach:,} positions, and the input needs {int(positions.max()) + 1:,}; "
                "shorten the input, or train with a scheme without a limit, such as rope, alibi or kerple"
            )


class LongspanRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary module, which can also rotate a part of each head's channels."""

    @staticmethod
    def compute_default_rope_parameters(config: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """The inverse frequencies (W/2,) of the W rotated channels, and the attention factor 1."""
        parameters = config.rope_parameters
        width = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float) / width
        return parameters["rope_theta"] ** -exponents, 1.0


class LongspanForCausalLM(LongspanPreTrainedModel, GenerationMixin):
    """A decoder that predicts next tokens. Raises `NotSupported` for a configuration of another kind."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        if config.kind != "decoder":
            raise NotSupported(
                f"next tokens are predicted by a decoder, and this configuration has kind={config.kind}; use kind=decoder"
            )
        self.model = LongspanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers', which takes the length of a cache for the number of the text's tokens in it."""
        cache = compat.peek_cache(kwargs)
        if kwargs.get("is_first_iteration") and next_sequence_length is not None and cache and cache.get_seq_length():
            next_sequence_length += self.model.leading
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)  # type: ignore[arg-type, misc]

    @can_return_tuple
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
        """Logits (B, T, vocab), and the loss where there are labels.

        labels (B, T): the inputs, -100 for no loss; they are shifted here. logits_to_keep: how many of the last tokens have
        logits, 0 for all, or their indices. The KV cache goes by either name, `cache` or `past_key_values`.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=compat.one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            **compat.output_cache(compat.cache_of(out)),
        )


def label_loss(
    logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of logits (B, T, vocab) and labels (B, T).

    The mean over labels; with `num_items_in_batch`, the labels of all batches that a Trainer accumulates, the sum divided by it.
    """
    sums = {"ignore_index": ignore_index, "reduction": "mean" if num_items_in_batch is None else "sum"}
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), **sums)  # type: ignore[arg-type]
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class _LabelHead(LongspanPreTrainedModel):
    """Base of the heads that read a text whole: a stack in `model`, and what `answer` makes of its output and of labels."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | SequenceClassifierOutput:
        """Logits, and the loss where there are labels: (B, T) of hidden tokens, -100 elsewhere, or (B,) of classes."""
        out = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        return self.answer(out, attention_mask, labels, kwargs)

    def answer(
        self, out: BaseModelOutputWithPast, mask: Tensor | None, labels: Tensor | None, kwargs: dict[str, Any]
    ) -> MaskedLMOutput | SequenceClassifierOutput:
        """The model's output from the stack's; mask is the caller's attention_mask."""
        raise NotImplementedError


class LongspanForMaskedLM(_LabelHead):
    """An encoder that predicts hidden tokens. Raises `NotSupported` for a configuration of another kind."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        if config.kind != "encoder":
            raise NotSupported(
                f"hidden tokens are predicted by an encoder, and this configuration has kind={config.kind}; use kind=encoder"
            )
        self.model = LongspanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def answer(
        self, out: BaseModelOutputWithPast, mask: Tensor | None, labels: Tensor | None, kwargs: dict[str, Any]
    ) -> MaskedLMOutput:
        logits = self.lm_head(out.last_hidden_state)
        loss = None if labels is None else label_loss(logits, labels, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions)


class LongspanForSequenceClassification(_LabelHead):
    """A classifier of texts.

    It reads the mean of a text's states in an encoder, and the state of the last real token in a decoder.
    """

    accepts_loss_kwargs = False
    """Tells the Trainer that the loss is the mean over a batch's texts, whatever else it accumulates."""

    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = LongspanModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    def answer(
        self, out: BaseModelOutputWithPast, mask: Tensor | None, labels: Tensor | None, kwargs: dict[str, Any]
    ) -> SequenceClassifierOutput:
        assert out.last_hidden_state is not None, "a stack always returns its last states"
        logits = self.score(self._pooled(out.last_hidden_state, mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )

    def _pooled(self, states: Tensor, mask: Tensor | None) -> Tensor:
        real = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
        if not self.model.causal:
            return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        last = (real * torch.arange(1, states.shape[1] + 1, device=states.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
