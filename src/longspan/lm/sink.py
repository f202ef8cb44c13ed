"""A learned sink: one trained token before every text, on which attention can rest (Xiao 2024, arXiv 2309.17453, section 3.3).

The paper puts "a single extra learnable token at the beginning of all training samples". Here the model does so itself, so that
data, `generate` and whatever is put on the model know nothing of it: a row's sink comes before its first real token, behind
padding on the left, and its state is cut from what comes out. It is a token like any other to attention, to the cache and to
methods: `streaming:sinks=1` keeps it and no token of the text. It is no learned logit beside the scores, which gpt-oss has.

Positions and masks are given as for the text alone. Where positions are given, those of the text move on by one.
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
"""Tells the end of a forward that its beginning put the token before the text."""


class SinkToken(nn.Module):
    """The token's embedding, and what stands before and after a stack that has one."""

    def __init__(self, hidden: int, std: float):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(hidden))
        self.draw_weights()

    def draw_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def attach(self, stack: PreTrainedModel) -> None:
        """Runs around every forward of the stack, closer to it than hooks that come later."""
        self._names = compat.parameters(stack.forward)
        stack.register_forward_pre_hook(self.before, with_kwargs=True)
        stack.register_forward_hook(self.after, with_kwargs=True)

    def before(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Puts the token before texts that begin here; later calls have it in their cache."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = compat.peek_cache(given)
        if getattr(cache, "is_compileable", False):
            raise NotSupported(
                f"sink=learned takes a place in the cache that a {type(cache).__name__} has not counted; use the default "
                "DynamicCache (in generate: leave out cache_implementation)"
            )
        seen = 0 if cache is None else cache.get_seq_length()
        led = given[LED] = seen == 0
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            return (), given  # the stack says what is wrong
        new = (ids if embeds is None else embeds).shape[1]  # type: ignore[union-attr]
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        begins = _begins(mask, new, seen)
        given["attention_mask"] = _with_sink(mask, begins)
        if led:
            given["input_ids"] = None
            given["inputs_embeds"] = self._lead(stack.embed_tokens(ids) if embeds is None else embeds, begins)  # type: ignore[operator]
            given["position_ids"] = _led_positions(positions, begins, mask)
        elif positions is not None:
            given["position_ids"] = positions + 1
        return (), given

    def after(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Cuts the sink's state off, which rows with padding have instead of their last padding token's."""
        if not kwargs.get(LED):
            return output
        if not isinstance(output, BaseModelOutputWithPast):
            return (output[0][:, 1:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, 1:]  # type: ignore[index]
        if output.hidden_states is not None:
            output.hidden_states = tuple(states[:, 1:] for states in output.hidden_states)
        return output

    def _lead(self, embeds: Tensor, begins: Tensor | None) -> Tensor:
        """(B, T, hidden) → (B, T + 1, hidden)."""
        weight = self.weight.to(embeds.dtype)
        if begins is None:
            return torch.cat((weight.expand(len(embeds), 1, -1), embeds), dim=1)
        return torch.where(_at(begins, embeds.shape[1] + 1)[..., None], weight, F.pad(embeds, (0, 0, 1, 0)))


def _begins(mask: Tensor | None, new: int, seen: int) -> Tensor | None:
    """How many padding tokens each row starts with, (B,), None without a mask; seen counts the sink."""
    if mask is None:
        return None
    whole = new + max(0, seen - 1)
    if mask.ndim != 2 or mask.shape[1] != whole:
        raise NotSupported(
            f"sink=learned takes a mask of the padding of all {whole:,} tokens so far, (batch, tokens), not one of shape "
            f"{tuple(mask.shape)}"
        )
    begins = (mask.cumsum(-1) == 0).sum(-1)
    if seen == 0 and bool((begins == new).any()):
        raise NotSupported(
            "sink=learned: a row begins after the first call; give the model some of every row's text first"
        )
    return begins


def _at(begins: Tensor, length: int) -> Tensor:
    """(B, length) boolean, True where a row's sink stands."""
    return torch.arange(length, device=begins.device) == begins[:, None]


def _with_sink(mask: Tensor | None, begins: Tensor | None) -> Tensor | None:
    """The mask with the sinks in it: before a row's sink is padding, after it the row as it was."""
    if mask is None or begins is None:
        return None
    led = F.pad(mask, (1, 0))
    return led.masked_fill(_at(begins, led.shape[1]), 1)


def _led_positions(positions: Tensor | None, begins: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The sink has its row's first position, the text those after it."""
    if positions is None:
        return None
    if mask is None and bool((positions.diff() < 0).any()):
        raise NotSupported(
            "sink=learned stands before a row, and several texts are packed into one: use data.packing=plain or none"
        )
    led = torch.cat((positions[:, :1], positions + 1), dim=1)
    if begins is None:
        return led
    return torch.where(_at(begins, led.shape[1]), F.pad(positions, (0, 1)), led)
