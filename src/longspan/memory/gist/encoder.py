"""Gist tokens in an encoder with a decoder: masks, and the gist tokens' states in every layer, which stand for the prompt.

The encoder is given a mask of pairs. What no decoder may see, the encoder hands out as zeros, so that the decoder's mask of
padding is known from the states alone: through beams, and when the encoder ran long before. Its last normalisation has
let no real state be zero.

Kept of a prompt is what goes into each layer at the gist tokens, and what comes out of the last. A text that goes on after it
runs with the gist tokens before it, whose states are put back in at every layer, as they were behind the prompt. Relative
positions (T5) come out right by themselves; a table of positions (BART) is read at the places behind the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from longspan.core.tokens import bos_id, encode_all
from longspan.engine.retrieval.gist_masks import kept, visible
from longspan.hf import encoder_decoder
from longspan.hf.site import Site
from longspan.memory.base import CacheReader
from longspan.memory.gist.settings import method_on
from longspan.util.errors import LongspanError, NotSupported


class EncoderReader(CacheReader[Any]):
    """Gist tokens on one encoder-decoder; of a prompt it keeps states and no keys and values."""

    kind = "gist"

    def reading(self) -> str:
        return f"gist:id={self.method.id}"

    def attach(self) -> None:
        self.site.state = self
        encoder = self.site.model.get_encoder()
        if encoder.config._attn_implementation not in ("eager", "sdpa"):
            raise NotSupported(
                f"gist hands the encoder a mask of pairs, which {encoder.config._attn_implementation!r} attention does not "
                'take; load the model with attn_implementation="sdpa"'
            )
        self._prove(encoder)
        encoder_decoder.around_encoder(self.site, self._before, self._after)
        self.site.before_forward(self._before_decoder)
        for layer in layers_of(encoder):
            self.site.keep_for_undo(layer.register_forward_pre_hook(_into_layer).remove)
        if (table := _table_of(encoder)) is not None:
            self.site.keep_for_undo(table.register_forward_hook(_out_of_table).remove)

    @torch.no_grad()
    def _prove(self, encoder: nn.Module) -> None:
        """That this architecture follows the mask: with everything hidden, other tokens before the gist tokens change nothing."""
        ids = torch.arange(1, 9, device=self.site.model.device)[None].repeat(2, 1)
        ids[1, :4] += 4
        ids[:, 4] = int(self.method.id or 0)
        training, trial = encoder.training, Site(self.site.model, self.site.methods, self.site.facts)
        hiding = EncoderReader(replace(self.method, mode="negative"), trial)
        encoder_decoder.around_encoder(trial, hiding._before, hiding._after)
        try:
            states = encoder.eval()(input_ids=ids).last_hidden_state
        finally:
            trial.undo()
            encoder.train(training)
        if not torch.allclose(states[0, 5:], states[1, 5:], rtol=1e-2, atol=1e-3):
            raise NotSupported(
                f"gist does not work on {self.site.facts.architecture}: its encoder does not follow a mask of pairs; use a "
                "model of T5's or BART's family"
            )

    def _before(self, encoder: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if ids is None:
            raise NotSupported("gist finds its tokens by their ids: give the model input_ids, not inputs_embeds")
        if mask is not None and mask.ndim != 2:
            raise NotSupported("gist takes a mask of padding, (texts, tokens), for the encoder, and no other mask")
        gist = self._hiding(ids)
        return arguments if gist is None else {**arguments, "attention_mask": self._numbers(gist, mask)}

    def _hiding(self, ids: Tensor) -> Tensor | None:
        """Which tokens are gist tokens, (B, T); None where nothing is hidden."""
        gist: Tensor = ids == self.method.id  # type: ignore[assignment]
        return gist if self.method.mode != "positive" and bool(gist.any()) else None

    def _numbers(self, gist: Tensor, mask: Tensor | None) -> Tensor:
        """(B, 1, T, T), to be added to the scores.

        Every token sees itself, so padding stays numbers.
        """
        count = gist.shape[1]
        sees = visible(gist, count, self.method.mode)
        if mask is not None:
            sees = sees & mask[:, None, :].bool()
        sees = sees | torch.eye(count, dtype=torch.bool, device=gist.device)
        table: Any = self.site.model.get_input_embeddings()
        dtype = table.weight.dtype
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]

    def _after(self, arguments: dict[str, Any], output: Any) -> Any:
        gist = self._hiding(arguments["input_ids"])
        if gist is None:
            return output
        states = output[0] * kept(gist, self.method.mode)[..., None].to(output[0])
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output

    def _before_decoder(self, arguments: dict[str, Any]) -> None:
        states, mask = arguments.get("encoder_hidden_states"), arguments.get("encoder_attention_mask")
        if states is None or self.method.mode == "positive":
            return
        real = states.ne(0).any(-1)
        if not bool(real.all()):
            arguments["encoder_attention_mask"] = real.long() if mask is None else mask * real.to(mask)


@dataclass
class GistStates:
    """Gist tokens of B prompts, k of each, in an encoder of L layers.

    states (L + 1, B, k, d): what goes into each layer, and the encoder's output. shift (B,): the tokens of each
    prompt that are gone.
    """

    states: Tensor
    shift: Tensor

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.shift)

    @property
    def tokens(self) -> int:
        return self.states.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return self.states.nbytes

    def inputs(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str], *, beams: int = 1
    ) -> dict[str, Any]:
        """What `generate` takes to go on after the prompts: encoder_outputs and attention_mask, which it repeats for its beams
        by itself. The encoder reads the texts here."""
        rows = [text_ids(tokenizer, text) for text in ([texts] if isinstance(texts, str) else texts)]
        ids, mask = padded(rows, tokenizer.pad_token_id or 0, model.device)
        return self.encode(model, ids, mask)

    @torch.no_grad()
    def encode(self, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """The same for tokens (B, T), padded on the right."""
        if len(self) not in (1, len(ids)):
            raise LongspanError(f"{len(self)} prompts cannot go before {len(ids)} texts; give one text for each prompt")
        lead = ids.new_full((len(ids), self.tokens), method_on(model).id or 0)
        ids, mask = torch.cat((lead, ids), dim=1), torch.cat((torch.ones_like(lead), mask.to(lead)), dim=1)
        states = self.states.expand(-1, len(ids), -1, -1)
        encoder: Any = model.get_encoder()
        with _doing(_Doing(_put_back(states), _places(encoder, self.shift, ids.shape[1]))):
            output = encoder(input_ids=ids, attention_mask=mask)[0]
        last = torch.cat((states[-1], output[:, self.tokens :]), dim=1)
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=last), "attention_mask": mask}


@torch.no_grad()
def compressed(model: PreTrainedModel, ids: Tensor, mask: Tensor, first: Tensor, count: int) -> GistStates:
    """Reads prompts (B, T) with gist tokens behind them, padded on the right, and keeps those. first (B,): the column of each
    row's first gist token."""
    places = (first[:, None] + torch.arange(count, device=first.device))[..., None]
    taken: list[Tensor] = []

    def take(states: Tensor) -> Tensor:
        taken.append(states.take_along_dim(places.to(states.device), dim=1))
        return states

    encoder: Any = model.get_encoder()
    with _doing(_Doing(take)):
        take(encoder(input_ids=ids, attention_mask=mask)[0])
    return GistStates(torch.stack([states.to(taken[-1].device) for states in taken]), first)


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """An encoder's layers, in order."""
    found = getattr(encoder, "block", None) or getattr(encoder, "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise NotSupported(
            f"gist does not know the layers of {type(encoder).__name__}; use a model of T5's or BART's family"
        )
    return found


@dataclass(frozen=True)
class _Doing:
    """What one call of an encoder does besides.

    change: is handed what goes into each layer, (B, T, d), to get what shall; places (B, T): the rows of the table of
    positions that are added to its tokens, where not the usual ones.
    """

    change: Callable[[Tensor], Tensor]
    places: Tensor | None = None


# Of this thread's call: an encoder asks its table of positions with a shape alone, on which nothing can be handed along. No
# gradient is wanted, so nothing runs again later.
_now: ContextVar[_Doing | None] = ContextVar("gist", default=None)


@contextlib.contextmanager
def _doing(what: _Doing) -> Iterator[None]:
    token = _now.set(what)
    try:
        yield
    finally:
        _now.reset(token)


def _into_layer(module: nn.Module, args: tuple) -> tuple | None:
    """The hook before each layer."""
    now = _now.get()
    return None if now is None else (now.change(args[0]), *args[1:])


def _out_of_table(table: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    """The hook after a table of positions."""
    now = _now.get()
    return None if now is None or now.places is None else F.embedding(now.places, cast(Tensor, table.weight))


def _put_back(states: Tensor) -> Callable[[Tensor], Tensor]:
    """What puts states (L + 1, B, k, d) in the place of the first k tokens, layer by layer."""
    left = iter(states)

    def change(hidden: Tensor) -> Tensor:
        own = next(left)
        return torch.cat((own.to(hidden), hidden[:, own.shape[1] :]), dim=1)

    return change


def _table_of(encoder: nn.Module) -> nn.Module | None:
    """The table of positions that an encoder adds to its tokens, if it has one."""
    return getattr(encoder, "embed_positions", None)


def _places(encoder: nn.Module, shift: Tensor, count: int) -> Tensor | None:
    """(B, T): where `count` tokens stand in the table of positions that are `shift` (B,) places further than usual."""
    table: Any = _table_of(encoder)
    if table is None:
        return None
    at = torch.arange(count, device=shift.device) + shift[:, None] + getattr(table, "offset", 0)
    if int(at.max()) >= len(table.weight):
        raise NotSupported(
            f"the prompt and the text are longer together than the {len(table.weight):,} places of this encoder"
        )
    return at


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text that goes on after another, ended as the tokenizer ends a text."""
    ids = encode_all(tokenizer, [text], add_special_tokens=True)[0]
    return ids[1:] if ids[:1] == [bos_id(tokenizer)] else ids


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, (B, T), padded on the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
