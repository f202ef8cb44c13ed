"""Unlimiformer: an encoder-decoder reads an input of any length, and each head of each layer picks what it looks at.

The input is encoded in windows that overlap, of which the middle is kept; only the last layer's states are stored, one vector
a token. A score is q·k = (h_d W_q)(h_e W_k)ᵀ = (h_d W_q W_kᵀ)·h_e: with W_k at the query, one store serves every head of every
layer, searched by inner product (section 2.3 of the paper). The softmax goes over the k best alone, whose states
meet this head's W_v after they are summed. A bias of the keys adds the same to all scores of a query, which changes neither
the order nor the softmax; the values' bias is added. Attention that reaches everything (k ≥ tokens) is the usual one.

Rows are stored without their padding, so none can be retrieved, and rows of a batch need not be alike. Beams share their row's
store. The model's own cache of cross-attention holds one stand-in key a layer: what grows with the input is the store.

The authors' code lets the first decoding step attend to the truncated input as the plain model does. Here every step retrieves:
the paper's text makes no exception, and forward and generation then agree.

Training (`model.train()`, section 3.2 of the paper): `random` attends to a random k of the encoded states, drawn for each layer
and forward; `retrieval` to the k best, with gradients through them; `alternating` to these in turn, retrieval first, as the
authors' code does. The encoding is computed again in the backward pass. `none` is test time only: training is the plain model's,
and an input longer than its window is refused. A key bias has no gradient, as it has no effect.

The decoder-only form of the authors' code is not the paper's claim and not offered: its search uses half of each head's
channels, since the two halves of its rotated key weights cancel in one half.

    ls.apply(model, "unlimiformer")
    book = ls.Encoded.of(model, ids)                  # read once
    book.save("book.safetensors", model)
    model.generate(encoder_outputs=book.outputs())    # asked as often as wanted; book + question joins two texts
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.engine.retrieval import top as retrieval
from longspan.hf import encoder_decoder
from longspan.hf.site import Site
from longspan.util.errors import LongspanError, NotSupported, writing

How = Literal["retrieval", "random"]
_ENCODED = "longspan_encoded"


@dataclass(frozen=True)
class Unlimiformer(Method):
    """`k` states are retrieved by each query of each head, from windows of `window` tokens that share `overlap` with their
    neighbours; both are the encoder's window where left out. `batch` windows are encoded at once. `search` is exact with `torch`
    and `faiss`; `ivf` is approximate and looks into `probes` of faiss's lists. `training` is what model.train() does."""

    k: int | None = None
    window: int | None = None
    overlap: float = 0.5
    batch: int = 8
    search: Literal["torch", "faiss", "ivf"] = "torch"
    probes: int | None = None
    training: Literal["none", "random", "retrieval", "alternating"] = "none"

    name: ClassVar[str] = "unlimiformer"
    title: ClassVar[str] = "Unlimiformer: cross-attention that retrieves from an input of any length"
    paper: ClassVar[str] = "Bertsch 2023, arXiv 2305.01625"
    seam: ClassVar[Any] = "memory"
    slots: ClassVar[frozenset[str]] = frozenset({"cross-attention"})
    works_on: ClassVar[str] = "encoder-decoders (BART, T5, LED)"
    encoder_decoders: ClassVar[bool] = True
    cost: ClassVar[str] = "time n, one state a token"
    why_not_exportable: ClassVar[str] = (
        "it stands between encoder and decoder, and a checkpoint only holds weights and settings"
    )

    def __post_init__(self) -> None:
        self.require(self.k is None or self.k >= 1, f"k must be at least 1 state, not {self.k}")
        self.require(self.window is None or self.window >= 4, f"window must be at least 4 tokens, not {self.window}")
        self.require(0 <= self.overlap < 1, f"overlap is the share of a window, from 0 to below 1, not {self.overlap}")
        self.require(1 <= self.batch <= 2**16, f"batch must be from 1 to 65,536 windows, not {self.batch:,}")
        self.require(self.probes is None or self.probes >= 1, f"probes must be at least 1 list, not {self.probes}")
        self.require(
            self.probes is None or self.search == "ivf",
            f"probes has no effect with search={self.search}; use search=ivf",
        )
        learns = self.training in ("retrieval", "alternating")
        self.require(
            self.search == "torch" or not learns,
            f"training={self.training} would build an index at every step; use search=torch to train",
        )

    def check(self, facts: ModelFacts) -> None:
        if not facts.encoder_decoder:
            raise NotSupported(
                f"unlimiformer retrieves what an encoder made, and {facts.architecture} is a decoder alone. The decoder-only "
                "form of the authors' code is not offered: its search sees half of each head's channels. Use streaming, yarn or "
                "self-extend, or an encoder-decoder (BART, T5, LED)"
            )
        if facts.absolute_positions and self.window and self.window > facts.window:
            raise NotSupported(
                f"unlimiformer: {facts.architecture} has positions for {facts.window:,} tokens, so windows of {self.window:,} "
                f"cannot be encoded; use window={facts.window} or less"
            )
        if self.search != "torch":
            retrieval.need_faiss()

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        probes = 32 if self.search == "ivf" else None  # the most that the authors' code uses
        return replace(self, k=self.k or facts.window, window=self.window or facts.window, probes=self.probes or probes)

    def reach(self, facts: ModelFacts) -> int | None:
        return None

    def neutral_length(self) -> int:
        assert self.k and self.window, "resolve() has filled them in"
        return min(self.k, self.window)

    def cache_tokens(self, facts: ModelFacts, length: int) -> int:
        return 1  # the stand-in

    def keys_seen(self, facts: ModelFacts, length: int) -> int:
        return min(self.k or facts.window, length)

    def attach(self, site: Site) -> None:
        site.state = Reader(self, site)
        site.state.attach()


class Window(NamedTuple):
    """Tokens start … end - 1 are encoded together, of which first … last - 1 are kept."""

    start: int
    end: int
    first: int
    last: int


def windows(length: int, window: int, overlap: float = 0.5) -> list[Window]:
    """The windows of a text of `length` tokens.

    Each token is kept once; what is kept has at least half the overlap on both sides, except at the text's ends. The
    last window is moved back until it is full.
    """
    if length <= window:
        return [Window(0, length, 0, length)]
    margin = int(window * overlap / 2)
    starts = [*range(0, length - window, window - 2 * margin), length - window]
    ends = [*(start + window - margin for start in starts[:-1]), length]
    return [
        Window(start, start + window, first, last) for start, first, last in zip(starts, [0, *ends], ends, strict=False)
    ]


@dataclass
class Encoded:
    """The encoder's states of one or several texts: a row (n, d) of each, n its tokens without padding."""

    rows: list[Tensor]
    _indexes: dict[tuple, retrieval.FaissIndex] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any
    ) -> Encoded:
        """Reads texts (B, N) of any length once, without gradients.

        Raises `NotSupported` for a model without the method. more: what else the encoder takes for each token, such
        as LED's `global_attention_mask`.
        """
        with torch.no_grad():
            output = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, **more)
        found = getattr(output, _ENCODED, None)
        if found is None:
            raise NotSupported('this model reads no more than its window; longspan.apply(model, "unlimiformer") first')
        return found

    @classmethod
    def of_states(cls, states: Tensor, mask: Tensor | None) -> Encoded:
        """From states (B, N, d) and a mask of padding (B, N), as an encoder without the method makes them."""
        return cls([row if mask is None else row[mask[i].bool()] for i, row in enumerate(states)])

    def outputs(self) -> BaseModelOutput:
        """What `generate` and the model take as `encoder_outputs`.

        A call of its own for each of them: they change it.
        """
        output = BaseModelOutput(last_hidden_state=self.stand_in())
        setattr(output, _ENCODED, self)
        return output

    def stand_in(self) -> Tensor:
        """(texts, 1, d) that stands where a decoder expects the states, with these on it."""
        return encoder_decoder.attach(encoder_decoder.stand_in(len(self.rows), self.rows[0]), self)

    def __add__(self, other: Encoded) -> Encoded:
        """The texts of both, joined row by row; one row joins every row.

        Which comes first makes no difference.
        """
        count = max(len(self.rows), len(other.rows))
        if {len(self.rows), len(other.rows)} - {1, count}:
            raise LongspanError(f"{len(self.rows)} and {len(other.rows)} texts cannot be joined row by row")
        mine, others = (x.rows * (count // len(x.rows)) for x in (self, other))
        return Encoded([torch.cat(pair) for pair in zip(mine, others, strict=True)])

    def save(self, path: str | Path, model: PreTrainedModel) -> None:
        """Writes a safetensors file that only `model`'s encoder can be asked about."""
        rows = {str(i): row.detach().contiguous().cpu() for i, row in enumerate(self.rows)}
        with writing(path):
            save_file(rows, str(path), metadata={"longspan": "encoder states", "encoder": _fingerprint(model)})

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> Encoded:
        """Reads what `save` wrote, onto the model's device.

        Raises `LongspanError` where it is no such file, or another encoder made it.
        """
        try:
            with safe_open(str(path), "pt", device=str(model.device)) as file:
                said = file.metadata() or {}
                if said.get("longspan") != "encoder states":
                    raise LongspanError(f"{path} holds no encoder states; write them with Encoded.save")
                rows = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        except (SafetensorError, OSError) as error:
            raise LongspanError(f"{path} cannot be read as encoder states: {error}; save them again") from error
        if said.get("encoder") != _fingerprint(model):
            raise LongspanError(
                f"{path} was made by another encoder, or in another dtype; read the text again with this model"
            )
        return cls(rows)

    def pick(self, row: int, k: int, method: Unlimiformer) -> retrieval.Pick | None:
        """How `k` states of a row are found; None where it has no more."""
        states = self.rows[row]
        if len(states) <= k:
            return None
        if method.search == "torch":
            return lambda queries: retrieval.nearest(queries, states, k)
        key = (row, method.search, method.probes)
        if key not in self._indexes:
            self._indexes[key] = retrieval.FaissIndex(states, method.search, method.probes or 0)
        return functools.partial(self._indexes[key], k=k)


def _text_of(arguments: dict[str, Any]) -> Tensor:
    """What the encoder reads, in whichever of its two forms."""
    given = arguments.get("input_ids") if arguments.get("input_ids") is not None else arguments.get("inputs_embeds")
    if not isinstance(given, Tensor):
        raise NotSupported("unlimiformer reads input_ids or inputs_embeds, and the encoder was given neither")
    return given


class Piece(NamedTuple):
    row: int
    window: Window


class Reading:
    """One call of the encoder, cut into batches of windows, and what they gave."""

    def __init__(self, arguments: dict[str, Any], method: Unlimiformer):
        given = _text_of(arguments)
        assert method.window, "resolve() has filled it in"
        by_token = {
            name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.shape[:2] == given.shape[:2]
        }
        mask = by_token.pop("attention_mask", None)
        if mask is None and arguments.get("attention_mask") is not None:
            raise NotSupported(
                "unlimiformer takes a mask of padding, (texts, tokens), for the encoder, and no other mask"
            )
        mask = torch.ones(given.shape[:2], device=given.device) if mask is None else mask
        self._rows = [{name: x[i, a:b] for name, x in by_token.items()} for i, (a, b) in enumerate(_spans(mask))]
        self._rest = {n: x for n, x in arguments.items() if n not in by_token and n != "attention_mask"}
        self.lengths = [len(next(iter(row.values()))) for row in self._rows]
        self._parts: list[list[Tensor]] = [[] for _ in self._rows]
        cut = (Piece(i, w) for i, n in enumerate(self.lengths) for w in windows(n, method.window, method.overlap))
        # Alike beside alike: little is filled up. The windows of one text are alike, so they stay in order.
        pieces = sorted(cut, key=lambda piece: piece.window.end - piece.window.start)
        self.batches = [pieces[i : i + method.batch] for i in range(0, len(pieces), method.batch)]

    def arguments(self, batch: Sequence[Piece]) -> dict[str, Any]:
        """The encoder's arguments for some windows; shorter ones are filled up on the right."""
        sizes = [window.end - window.start for _, window in batch]
        cut = [{n: x[w.start : w.end] for n, x in self._rows[row].items()} for row, w in batch]
        stacked = {n: nn.utils.rnn.pad_sequence([c[n] for c in cut], batch_first=True) for n in cut[0]}
        one = next(iter(stacked.values()))
        real = torch.arange(one.shape[1], device=one.device) < torch.tensor(sizes, device=one.device)[:, None]
        return {**self._rest, **stacked, "attention_mask": None if len(set(sizes)) == 1 else real.long()}

    def take(self, batch: Sequence[Piece], states: Tensor) -> None:
        """states (windows, tokens, d): keeps of each window what is its own, and lets go of the rest. Without gradients it goes
        straight to its place: put together at the end, a long text would lie in memory twice."""
        for (row, w), some in zip(batch, states, strict=True):
            own = some[w.first - w.start : w.last - w.start]
            if states.requires_grad:
                self._parts[row].append(own.clone())
                continue
            if not self._parts[row]:
                self._parts[row] = [own.new_empty(self.lengths[row], own.shape[1])]
            self._parts[row][0][w.first : w.last] = own

    def encoded(self) -> Encoded:
        return Encoded([parts[0] if len(parts) == 1 else torch.cat(parts) for parts in self._parts])


def _spans(mask: Tensor) -> Iterator[tuple[int, int]]:
    """Where each row's text begins and ends, of a mask (B, N) of padding."""
    for row in mask.bool():
        real = row.nonzero()[:, 0]
        if not len(real):
            raise NotSupported("unlimiformer: a row of the batch has no token, only padding")
        first, last = int(real[0]), int(real[-1]) + 1
        if last - first != len(real):
            raise NotSupported(
                "unlimiformer: a mask may hide padding before and after a row's text, not tokens within it"
            )
        yield first, last


@dataclass
class Given:
    """What a forward of the decoder attends to, and how."""

    encoded: Encoded
    how: How


class Reader:
    """Unlimiformer on one model: reads for its encoder, and attends for its decoder."""

    def __init__(self, method: Unlimiformer, site: Site):
        self.method, self.model = method, site.model
        self._site = site
        self._forwards = 0
        """Begun in training so far, for `alternating`; which of the two a forward does is handed along with it."""

    def attach(self) -> None:
        encoder_decoder.before_model(self._site, self._begin)
        encoder_decoder.around_encoder(self._site, self._before_encoder, self._after_encoder)
        self._site.before_forward(self._before_decoder)
        encoder_decoder.cross_attention(self._site, self._attend)

    # One forward: the encoder reads, and what was read goes to the decoder on the tensor that stands for it.

    def _begin(self, arguments: dict[str, Any]) -> None:
        """`generate` makes more rows of the stand-in for beams, and leaves the output that holds it as it was."""
        outputs = arguments.get("encoder_outputs")
        encoded = getattr(outputs, _ENCODED, None)
        if encoded is not None:
            encoder_decoder.attach(outputs[0], encoded)  # type: ignore[index]

    def _before_encoder(self, encoder: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """Encodes all batches of windows but the last, which the running call is given."""
        for name, wanted in (("output_hidden_states", False), ("output_attentions", False), ("return_dict", True)):
            if arguments.get(name) not in (None, wanted):
                raise NotSupported(
                    f"unlimiformer keeps the last layer's states only; leave out {name}={arguments[name]}"
                )
        reading = Reading(arguments, self.method)
        self._check_training(max(reading.lengths))
        *before, last = reading.batches
        for batch in before:
            reading.take(batch, self._encode(encoder, reading.arguments(batch)))
        running = reading.arguments(last)
        encoder_decoder.attach(_text_of(running), (reading, last))  # a tensor of this call alone
        return running

    def _encode(self, encoder: nn.Module, arguments: dict[str, Any]) -> Tensor:
        """The last layer's states of one batch: through `forward`, since hooks are for the whole text."""
        if not torch.is_grad_enabled():
            return encoder.forward(**arguments)[0]
        return checkpoint(lambda: encoder.forward(**arguments)[0], use_reentrant=False)

    def _after_encoder(self, arguments: dict[str, Any], output: Any) -> Any:
        reading, last = encoder_decoder.detach(_text_of(arguments))
        reading.take(last, output[0])
        encoded = reading.encoded()
        output.last_hidden_state = encoded.stand_in()
        setattr(output, _ENCODED, encoded)
        return output

    def _before_decoder(self, arguments: dict[str, Any]) -> None:
        states = arguments.get("encoder_hidden_states")
        if states is None:
            raise NotSupported(f"{self.method.spec} needs the encoder's states; give input_ids or encoder_outputs")
        encoded: Encoded | None = encoder_decoder.attached(states)
        if encoded is None and encoder_decoder.is_stand_in(states):
            raise NotSupported(
                f"{self.method.spec}: these encoder outputs have lost the states that belong to them; hand on what the encoder "
                "returned, or Encoded.outputs()"
            )
        encoded = encoded or Encoded.of_states(states, arguments.get("encoder_attention_mask"))
        if len(states) % len(encoded.rows):
            raise NotSupported(f"{len(states)} rows of a decoder cannot share {len(encoded.rows)} texts evenly")
        zeros = torch.zeros_like(states[:, :1])
        arguments["encoder_hidden_states"] = encoder_decoder.attach(zeros, Given(encoded, self._how()))
        arguments["encoder_attention_mask"] = None

    # Training.

    def _check_training(self, longest: int) -> None:
        assert self.method.window, "resolve() has filled it in"
        if self._site.training and self.method.training == "none" and longest > self.method.window:
            raise NotSupported(
                f"{self.method.spec} is for test time: in training the model reads its window of {self.method.window:,} tokens, "
                f"and this input has {longest:,}. Cut it, use training=random, retrieval or alternating, or model.eval()"
            )

    def _how(self) -> How:
        if not self._site.training:
            return "retrieval"
        self._forwards += 1
        if self.method.training == "alternating":
            return "retrieval" if self._forwards % 2 else "random"
        return "random" if self.method.training == "random" else "retrieval"

    # The cross-attention of one layer.

    def _attend(
        self, projections: encoder_decoder.Projections, given: Given, query: Tensor, scale: float, dropout: float
    ) -> Tensor:
        """(B, H, T, D).

        The rows of a text stand together: beams and samples of one share its store.
        """
        key, value = projections.key, projections.value
        heads, width = query.shape[1], query.shape[3]
        moved = torch.einsum("bhtd,hdm->bhtm", query * scale, key.weight.unflatten(0, (heads, width)))
        rows = moved.split(len(moved) // len(given.encoded.rows))
        summed = torch.cat([self._row(given, i, some, dropout) for i, some in enumerate(rows)])
        out = torch.einsum("bhtm,hdm->bhtd", summed, value.weight.unflatten(0, (heads, width)))
        return out if value.bias is None else out + value.bias.view(heads, 1, width)

    def _row(self, given: Given, row: int, query: Tensor, dropout: float) -> Tensor:
        """The sums of one text's states (rows, H, T, d) that the queries (rows, H, T, d), scaled, attend to."""
        states, k = given.encoded.rows[row], self.method.k
        assert k, "resolve() has filled it in"
        pick = given.encoded.pick(row, k, self.method)
        if pick is not None and given.how == "random":
            states, pick = states[torch.randperm(len(states), device=states.device)[:k]], None
        return retrieval.attend(query.flatten(0, 2), states, pick, k, dropout).view(query.shape)


def _fingerprint(model: PreTrainedModel) -> str:
    """sha256, in hex, of the encoder's weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.get_encoder().state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
