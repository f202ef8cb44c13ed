"""A learned attention sink: one trained token before every text (Xiao 2024, arXiv 2309.17453, section 3.3).

The paper puts "a single extra learnable token at the beginning of all training samples". Here the model does so, unknown to data,
to `generate` and to methods applied to the model: a row's sink is before its first real token, after padding on the left, and its
state is removed from the output. For attention, the KV cache and methods it is an ordinary token: `streaming:sinks=1` keeps it
and no token of the text. It is not a trained logit beside the scores, as in gpt-oss.

Callers pass positions and masks of the text alone; the positions of the text are increased by one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from longspan.hf import compat
from longspan.util.errors import NotSupported

LED = "longspan_led"
"""The keyword argument by which the pre-hook tells the hook after a forward that it added the token."""


class SinkToken(nn.Module):
    """The token's embedding (hidden,), and the hooks before and after a stack that has one."""

    def __init__(self, hidden: int, std: float):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(hidden))
        self.draw_weights()

    def draw_weights(self) -> None:
        """Draws the embedding, normal with the model's initial standard deviation."""
        nn.init.normal_(self.weight, std=self.std)

    def attach(self, stack: PreTrainedModel) -> None:
        """Registers the hooks on a stack, so that hooks registered later run around them."""
        self._names = compat.parameters(stack.forward)
        stack.register_forward_pre_hook(self.before, with_kwargs=True)
        stack.register_forward_hook(self.after, with_kwargs=True)

    def before(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Adds the token to texts that begin with this call; later calls have it in their cache."""
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = compat.peek_cache(arguments)
        if getattr(cache, "is_compileable", False):
            raise NotSupported(
                f"sink=learned adds a token to the cache, for which a {type(cache).__name__} has no slot; use the default "
                "DynamicCache (in generate: leave out cache_implementation)"
            )
        cached = 0 if cache is None else cache.get_seq_length()
        led = arguments[LED] = cached == 0
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            return (), arguments  # the stack says what is wrong
        new = (ids if embeds is None else embeds).shape[1]  # type: ignore[union-attr]
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        begins = _begins(mask, new, cached)
        arguments["attention_mask"] = _with_sink(mask, begins)
        if led:
            arguments["input_ids"] = None
            arguments["inputs_embeds"] = self._lead(stack.embed_tokens(ids) if embeds is None else embeds, begins)  # type: ignore[operator]
            arguments["position_ids"] = _led_positions(positions, begins, mask)
        elif positions is not None:
            arguments["position_ids"] = positions + 1
        return (), arguments

    def after(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Removes the first column of states: the sink's, or padding's in rows that are padded on the left."""
        if not kwargs.get(LED):
            return output
        if not isinstance(output, BaseModelOutputWithPast):
            return (output[0][:, 1:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, 1:]  # type: ignore[index]
        if output.hidden_states is not None:
            output.hidden_states = tuple(states[:, 1:] for states in output.hidden_states)
        return output

    def _lead(self, embeds: Tensor, begins: Tensor | None) -> Tensor:
        """Embeddings (B, T + 1, hidden) with the token in front of each text, from embeddings (B, T, hidden)."""
        weight = self.weight.to(embeds.dtype)
        if begins is None:
            return torch.cat((weight.expand(len(embeds), 1, -1), embeds), dim=1)
        return torch.where(_at(begins, embeds.shape[1] + 1)[..., None], weight, F.pad(embeds, (0, 0, 1, 0)))


def _begins(mask: Tensor | None, new: int, cached: int) -> Tensor | None:
    """The padding tokens (B,) at the start of each row; None without a mask.

    cached: tokens in the cache, with the sink.
    """
    if mask is None:
        return None
    whole = new + max(0, cached - 1)
    if mask.ndim != 2 or mask.shape[1] != whole:
        raise NotSupported(
            f"sink=learned takes a mask of the padding of all {whole:,} tokens so far, (batch, tokens), not one of shape "
            f"{tuple(mask.shape)}"
        )
    begins = (mask.cumsum(-1) == 0).sum(-1)
    if cached == 0 and bool((begins == new).any()):
        raise NotSupported(
            "sink=learned: a row has only padding in the first call; pass at least one token of every row's text in it"
        )
    return begins


def _at(begins: Tensor, length: int) -> Tensor:
    """Boolean (B, length), True at each row's sink."""
    return torch.arange(length, device=begins.device) == begins[:, None]


def _with_sink(mask: Tensor | None, begins: Tensor | None) -> Tensor | None:
    """The mask (B, T + 1) with the sinks: padding before a row's sink, the row's mask after it."""
    if mask is None or begins is None:
        return None
    led = F.pad(mask, (1, 0))
    return led.masked_fill(_at(begins, led.shape[1]), 1)


def _led_positions(positions: Tensor | None, begins: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Positions (B or 1, T + 1): the sink has its row's first position, the text those after it."""
    if positions is None:
        return None
    if mask is None and bool((positions.diff() < 0).any()):
        raise NotSupported(
            "sink=learned adds one token before each row, and several texts are packed into a row; use data.packing=plain or none"
        )
    led = torch.cat((positions[:, :1], positions + 1), dim=1)
    if begins is None:
        return led
    return torch.where(_at(begins, led.shape[1]), F.pad(positions, (0, 1)), led)
