"""Longformer: window attention, dilated in some heads, and in encoders global tokens (Beltagy 2020).

A token sees `window` others, half of them before it and half after; in a decoder all of them before (section 3.1). Through the
layers information reaches window · layers tokens, and `dilation` times as many in heads that see only every `dilation`-th. All
tokens see a global token as any other key, in the same softmax and once, though it may be in the window too. Its own row is
attention to all tokens, with projections that are initialised as copies of the others (sections 3.1 and 3.2). Windows and
dilations that differ by layer are a list in `attention=`; the paper's windows grow with the layer, and two heads of the upper
layers are dilated.

The paper's LED is a decoder with cross-attention to such an encoder: kind=encoder-decoder with decoder_attention=full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from longspan.attention.longformer.layer import LongformerAttention
from longspan.engine import backends
from longspan.engine.blocks.tables import Blocks, band
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.patterns import masked_attention, some_heads
from longspan.engine.window.banded import banded_attention
from longspan.hf.encoder_form import EncoderForm
from longspan.lm.base import Pattern
from longspan.lm.configuration import LongspanConfig
from longspan.lm.layers import LongspanAttention
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported, SpecError


@dataclass(frozen=True)
class Longformer(Pattern):
    """Window attention with global tokens.

    `window`: tokens that a token sees besides itself, an even number in an encoder. `dilated`: the number of heads,
    the last ones, in which they are `dilation` apart. `globals`: first tokens of a text that are global, besides
    those of `global_attention_mask` (B, T); in an encoder only, as in the paper.
    """

    window: int = 512
    dilated: int = 0
    dilation: int = 1
    globals: int = 0

    name = "longformer"
    title = "Longformer: window, dilated heads, global tokens"
    also = ("led", "longformer-encoder-decoder")
    works_on = "from scratch, trained encoders (longspan apply)"
    paper = "Beltagy 2020, arXiv 2004.05150"
    cost = "time n, cache constant"
    takes_globals = True

    def __post_init__(self) -> None:
        self.require(self.window >= 1, f"window must be at least 1 token, not {self.window}")
        self.require(self.globals >= 0, f"globals must be 0 or more tokens, not {self.globals}")
        self.require(self.dilated >= 0, f"dilated must be 0 or more heads, not {self.dilated}")
        self.require(self.dilation >= 1, f"dilation must be 1 or more, not {self.dilation}")
        self.require(
            (self.dilated == 0) == (self.dilation == 1),
            f"dilated={self.dilated} heads with dilation={self.dilation} contradict each other; set both, such as "
            "dilated=2,dilation=2, or neither",
        )

    def encoder_form(self) -> EncoderForm:
        return EncoderForm(
            encoder=transformers.LongformerModel,
            masked=transformers.LongformerForMaskedLM,
            check=self._check_encoder,
            config=self._encoder_config,
            bert_names=False,
            copied=tuple((f".self.{part}.", f".self.{part}_global.") for part in ("query", "key", "value")),
            note="name the global tokens in each call: global_attention_mask=(batch, tokens), 1 for them",
        )

    def _check_encoder(self, length: int) -> None:
        if self != (known := Longformer(window=self.window)):
            hint = " and name global tokens in each call with global_attention_mask" if self.globals else ""
            raise NotSupported(f"{self.spec}: transformers' Longformer has no such settings; use {known.spec}{hint}")
        if self.window % 2:
            raise SpecError(f"an encoder sees half of the window on either side; use window={self.window + 1}")

    def _encoder_config(
        self, old: transformers.PreTrainedConfig, settings: dict[str, Any], length: int
    ) -> transformers.LongformerConfig:
        rows = length + old.pad_token_id + 1
        return transformers.LongformerConfig(**settings, attention_window=self.window, max_position_embeddings=rows)

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        heads = config.num_attention_heads
        self.require(self.dilated <= heads, f"dilated={self.dilated} exceeds the {heads} heads of the model")
        if causal and self.globals:
            raise NotSupported(
                f"attention={self.spec}: a global token sees later tokens, so a decoder has none; leave globals out, or use "
                "kind=encoder, or kind=encoder-decoder with decoder_attention=full"
            )
        if not causal and self.window % 2:
            raise NotSupported(
                f"attention={self.spec}: an encoder sees half of the window on either side; use window={self.window + 1}"
            )
        return super().build(config, layer, encoding, causal=causal)

    def module_class(self) -> type[LongspanAttention]:
        return LongformerAttention

    def mask(self, queries: Tensor, keys: Tensor, shape: AttentionShape) -> Tensor:
        apart = torch.ones(shape.heads, 1, 1, dtype=torch.long, device=queries.device)
        apart[shape.heads - self.dilated :] = self.dilation
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        before, after = self._sides(shape)
        return (distance % apart == 0) & (distance <= before * apart) & (distance >= -after * apart)

    def ranges(self, start: int, end: int, shape: AttentionShape) -> list[tuple[int, int]]:
        before, after = (side * self.dilation for side in self._sides(shape))
        return [(max(0, start - before), min(shape.length, end + after))]

    def blocks(self, shape: AttentionShape, size: int, device: torch.device) -> Blocks | None:
        if self.dilated:
            return None
        lengths, window = (shape.length, shape.length), min(self._sides(shape)[0] + 1, shape.length)
        return band(lengths, window=window, causal=shape.causal, size=size, device=device)

    def sinks_and_window(self) -> tuple[int, int] | None:
        return None if self.dilated else (0, self.window + 1)

    def cached(self) -> tuple[int, int]:
        return 0, self.window * self.dilation + 1

    def run(self, call: AttentionCall, shape: AttentionShape) -> Tensor:
        if call.query_scores is not None:
            return masked_attention(self, call, shape)
        if not self.dilated and call.always_visible is None and backends.choose(self, call, shape).backend != "masks":
            return backends.run(self, call, shape)
        before, after = self._sides(shape)
        plain = shape.heads - self.dilated
        if plain == shape.heads:
            return banded_attention(call, before, after)
        dilated = banded_attention(some_heads(call, plain, shape.heads), before, after, self.dilation)
        if not plain:
            return dilated
        return torch.cat((banded_attention(some_heads(call, 0, plain), before, after), dilated), dim=1)

    def _sides(self, shape: AttentionShape) -> tuple[int, int]:
        """The numbers of visible tokens before and after a token."""
        return (self.window, 0) if shape.causal else (self.window // 2, self.window // 2)
