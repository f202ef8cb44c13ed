"""The encoder-decoder of `longspan.lm`, which transformers' `generate` runs.

Both stacks have the position scheme of the configuration, each with parameters of its own; cross-attention has no positions, as
in T5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils.generic import can_return_tuple

from longspan.hf import compat
from longspan.lm.configuration import LongspanConfig
from longspan.lm.modeling import LongspanModel, LongspanPreTrainedModel, label_loss
from longspan.util.errors import NotSupported


class LongspanEncoder(LongspanModel):
    """The encoder's stack, as `generate` calls it."""

    main_input_name = "input_ids"

    def __init__(self, config: LongspanConfig):
        super().__init__(config, kind="encoder")


class LongspanForConditionalGeneration(LongspanPreTrainedModel, GenerationMixin):
    """An encoder, a decoder with cross-attention and an output matrix. Raises `NotSupported` for another kind."""

    _tied_weights_keys = {
        "lm_head.weight": "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
    }

    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        if config.kind != "encoder-decoder":
            raise NotSupported(f"a model of kind={config.kind} has one stack; use kind=encoder-decoder")
        self.encoder = LongspanEncoder(config)
        self.decoder = LongspanModel(config, kind="decoder with cross-attention", layers=config.decoder_layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> LongspanModel:
        """The encoder's stack."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings, which both stacks share."""
        return self.encoder.embed_tokens

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels (B, T) shifted right by one, after the token that begins every answer.

        Raises `NotSupported` where the configuration names no such token.
        """
        start = self.config.decoder_start_token_id
        start = self.config.pad_token_id if start is None else start
        if start is None:
            raise NotSupported(
                "set decoder_start_token_id, or pad_token_id, in the configuration: a decoder begins with it"
            )
        shifted = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id or 0)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        global_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, T, vocab) of the decoder, and the loss where there are labels.

        labels (B, T): the answer's tokens, -100 for no loss; without decoder inputs these follow from them. global_attention_mask
        (B, T): the encoder's global tokens, where its attention has them. The cache goes by either name.
        """
        past_key_values = compat.one_cache(cache, past_key_values)
        if encoder_outputs is None:
            both = {k: kwargs[k] for k in ("output_hidden_states", "output_attentions") if k in kwargs}
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                global_attention_mask=global_attention_mask,
                **both,
            )
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and labels is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        out = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            cache=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=False if past_key_values is None else use_cache,
            encoder_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            **kwargs,
        )
        logits = self.lm_head(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = label_loss(logits, labels, **kwargs)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=out.attentions,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
            encoder_last_hidden_state=encoder_outputs[0],
            **compat.output_cache(compat.cache_of(out)),
        )
