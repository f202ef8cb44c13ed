"""Text from a model with a method applied: one answer, or a chat without end.

An answer is decoded by transformers' own `generate`.

A chat keeps one KV cache for the whole conversation and feeds only the new tokens of each turn. With a method that bounds
the cache (`streaming`) memory is constant however long the conversation. The new tokens of a turn are the difference of the
chat template rendered with and without it; where the template rewrites earlier turns, the whole conversation is fed again.
A model without a template continues plain text, on request.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

from longspan.core.chat_template import Messages, encode_rendered, render
from longspan.core.facts import ModelFacts, facts_of, text_config
from longspan.core.method import combination
from longspan.core.tokens import encode, with_bos
from longspan.hf.compat import cache_of, with_cache
from longspan.hf.site import current, site_of
from longspan.memory.document import Memory
from longspan.meter import cache_bytes
from longspan.reading.documents import question_ids
from longspan.reading.prefill import chunk_size
from longspan.reading.stream_decoder import StreamDecoder, steps_are_faster, stream_generate
from longspan.util.errors import LongspanError, NotSupported, SpecError

CHUNK = 1024
"""Tokens of a chat's turn that pass through the model at once, so that a long turn needs no more memory than a short one."""

OnText = Callable[[str], None]
_ANSWER = "\u2063answer\u2063"
"""Placeholder of the model's answers where the template is rendered only for the text around them: templates trim answers,
and hide parts of them, which must not look like a changed conversation."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Temperature 0 takes the likeliest. Raises `SpecError` for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise SpecError(f"temperature must be 0 or a positive number, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.temperature == 0 and self.top_p != 1:
            raise SpecError("top_p has no effect at temperature 0; set a temperature too, for example 0.7")
        if self.temperature == 0 and self.seed is not None:
            raise SpecError("a seed has no effect at temperature 0; set a temperature too, for example 0.7")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise SpecError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")

    def settings(self) -> dict[str, Any]:
        """The sampling as arguments of transformers' `GenerationConfig`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

    @contextlib.contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Seeds torch's random numbers within a `with` block; afterwards the caller's state is restored."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield


def check_settings(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> Sampling:
    """The sampling for these settings.

    Raises `SpecError` for one out of range, before a model is loaded.
    """
    if not 1 <= max_new_tokens < 2**31:
        raise SpecError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    return Sampling(temperature, top_p, seed)


@dataclass(frozen=True)
class Generation:
    """The answer of `generate_text`, with its times in seconds.

    decode_s_per_token: None for an answer of one token. stop: `end` for an end-of-text token, `length` where the answer
    reached `max_new_tokens`. warnings: sentences for the user.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prefill_s: float
    decode_s_per_token: float | None
    stop: Literal["end", "length"]
    warnings: tuple[str, ...]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool | None = None) -> list[int]:
    """The token ids of a prompt, with one beginning-of-text token where the tokenizer uses one.

    chat: True puts the prompt into the tokenizer's chat template as a user's message, False encodes it as plain text,
    None uses the template where there is one. Raises `NotSupported` for True without a template, `SpecError` for an
    empty prompt.
    """
    if not prompt.strip():
        raise SpecError("the prompt is empty")
    if chat is None:
        chat = tokenizer.chat_template is not None
    if not chat:
        return with_bos(tokenizer, encode(tokenizer, prompt))
    text = render(tokenizer, [{"role": "user", "content": prompt}])
    return with_bos(tokenizer, encode_rendered(tokenizer, text))


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool | None = None,
    memory: Memory | None = None,
    on_text: OnText | None = None,
) -> Generation:
    """Answers `prompt` with the model and the method applied to it.

    on_text: receives each new piece of text. chat: as in `prompt_ids`. memory: a document that the model has read,
    which `prompt` continues; `chat` is then the memory's own. temperature: 0 for greedy decoding. Raises `SpecError`
    for settings out of range, and `LongspanError` where the tokenizer does not fit the model or its logits are not
    numbers. A prompt that is too long for the method, with its answer, is still answered: `warnings` of the result
    says so.
    """
    sampling = check_settings(max_new_tokens, temperature, top_p, seed)
    if memory is not None:
        memory.check_model(model)
    unread = prompt_ids(tokenizer, prompt, chat=chat) if memory is None else question_ids(tokenizer, memory, prompt)
    ids = unread if memory is None else [*memory.ids.tolist(), *unread]
    ends, chunk = end_tokens(model, tokenizer), chunk_size(model, len(ids))
    stream = _Stream(tokenizer, on_text)
    _check_ids(model, ids)
    question = torch.tensor([unread], device=model.device)
    inputs = prompt_inputs(question) if memory is None else memory.inputs(question)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
        prefill_chunk_size=chunk if len(ids) > chunk and memory is None else None,
        **sampling.settings(),
    )
    with torch.no_grad(), sampling.seeded(model.device):
        stream.start()
        output = model.generate(  # type: ignore[operator]
            **inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([_CheckLogits()]),
            streamer=stream,
            **({"custom_generate": stream_generate} if steps_are_faster(model) else {}),
        )
    tokens = tuple(output[0, len(ids) :].tolist())
    return Generation(
        text=_text(tokenizer, tokens, special=False),
        tokens=tokens,
        prompt_tokens=len(ids),
        prefill_s=stream.times[0] - stream.started,
        decode_s_per_token=(stream.times[-1] - stream.times[0]) / (len(tokens) - 1) if len(tokens) > 1 else None,
        stop="end" if tokens[-1] in ends else "length",
        warnings=tuple(filter(None, [reach_warning(model, len(ids) + len(tokens))])),
    )


def prompt_inputs(ids: Tensor) -> dict[str, Tensor]:
    """Arguments of `generate` for a prompt of token ids (1, T)."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def reach_warning(model: PreTrainedModel, length: int) -> str | None:
    """A warning where `length` tokens are more than the model can read with its method.

    None otherwise.
    """
    methods = current(model) or combination("none")
    reach = methods.reach(plain_facts(model))
    if reach is None or length <= reach:
        return None
    return (
        f"{length:,} tokens are more than the {reach:,} that the model can read with {methods.spec}: expect nonsense "
        "past them. A larger factor, or streaming, reaches further"
    )


def plain_facts(model: PreTrainedModel) -> ModelFacts:
    """Facts of the model without the method that is applied to it."""
    site = site_of(model)
    return site.facts if site is not None else facts_of(model)


def default_chat_method(facts: ModelFacts) -> str:
    """The spec of `streaming` for a chat: four sinks, and at most 2,044 tokens."""
    return f"streaming:sinks=4,window={min(2044, facts.window - 4)}"


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end an answer, ascending."""
    named = getattr(model.generation_config, "eos_token_id", None)
    found = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return sorted(token for token in found if token is not None)


@dataclass
class ChatStats:
    """Counters of a chat: tokens read, bytes of cache, turns, speed.

    refed: how often the whole conversation had to be fed again. tokens_per_s: None before the first answer.
    """

    tokens: int = 0
    cache_bytes: int = 0
    turns: int = 0
    refed: int = 0
    tokens_per_s: float | None = None


class Chat:
    """A conversation on one KV cache, as long as the model's method allows.

        chat = Chat(model, tokenizer)
        chat.say("Hello", on_text=print)

    plain: without a chat template; each message is a new line of one text that the model continues.

    Raises `NotSupported` for a tokenizer without a chat template, unless plain, and for a system message in a plain text,
    in which it would not be an instruction; `SpecError` for settings out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        plain: bool = False,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ):
        if plain and system:
            raise NotSupported(
                "a plain text has no system message; leave it out, and write it as the beginning of the text"
            )
        self.sampling = check_settings(max_new_tokens, temperature, top_p, seed)
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self._system: Messages = [{"role": "system", "content": system}] if system else []
        self._ends = frozenset(end_tokens(model, tokenizer))
        self.pick = _Picker(self.sampling, model.device)
        self._plain = plain
        self.reset()
        if not plain:
            render(tokenizer, [*self._system, {"role": "user", "content": "Hello"}])  # refuses before the first turn

    def reset(self) -> None:
        """Starts a new conversation, without the messages and the cache of the last one."""
        self.stats = ChatStats()
        self.messages: Messages = list(self._system)
        self.drop_cache()

    def say(self, text: str, on_text: OnText | None = None) -> str:
        """The model's answer to `text`; `on_text` receives it piece by piece.

        An answer that KeyboardInterrupt stops leaves the conversation as it was before this turn. Raises `SpecError` for
        an empty message, and `LongspanError` as `generate_text` does.
        """
        if not text.strip():
            raise SpecError("an empty message; write something, or /exit")
        user = {"role": "user", "content": text}
        try:
            answer = self._answer(self._new_tokens(user), _Stream(self.tokenizer, on_text))
        except BaseException:
            self.drop_cache()  # the cache may contain a part of the turn: the next one feeds everything again
            raise
        self.messages += [user, {"role": "assistant", "content": answer}]
        self.stats.turns += 1
        self.stats.cache_bytes = cache_bytes(self._cache)
        return answer

    @property
    def warning(self) -> str | None:
        """A warning once the conversation is longer than the method can read; None before."""
        return reach_warning(self.model, self.stats.tokens)

    def drop_cache(self) -> None:
        """Makes the next turn feed the whole conversation again, into a new cache."""
        self._cache: Any = None
        self._decoder: StreamDecoder | None = None
        self._shape: Messages = list(self._system)
        self._rendered = ""
        self._unread: list[int] = []
        self.stats.tokens = 0

    def _new_tokens(self, user: dict[str, str]) -> list[int]:
        """Token ids that the model has not read: the last one of the last answer, and what the template adds after it."""
        if self._plain:
            return self._continued(user)
        rendered = render(self.tokenizer, [*self._shape, user])
        added = rendered[len(self._rendered) :]
        before, _, tail = added.partition(_ANSWER)
        if self._cache is None or not rendered.startswith(self._rendered) or before.strip() or before == added:
            return self._everything(user)
        unread = self._unread
        if unread[-1] in self._ends:
            end = _text(self.tokenizer, unread, special=True)
            tail, unread = (tail.lstrip()[len(end) :], unread) if tail.lstrip().startswith(end) else (tail, [])
        self._next_shape(user, rendered)
        return unread + encode_rendered(self.tokenizer, tail)

    def _continued(self, user: dict[str, str]) -> list[int]:
        """`_new_tokens` of a text without a template, which continues in a new line."""
        if self._cache is not None:
            return self._unread + encode(self.tokenizer, f"\n{user['content']}")
        if self.messages:
            self.stats.refed += 1
            self.drop_cache()
        lines = [f"\n{m['content']}" if m["role"] == "user" else m["content"] for m in (*self.messages, user)]
        return with_bos(self.tokenizer, encode(self.tokenizer, "".join(lines).removeprefix("\n")))

    def _everything(self, user: dict[str, str]) -> list[int]:
        """Token ids of the whole conversation, for the first turn and where the template rewrote earlier ones."""
        if self._cache is not None:
            self.stats.refed += 1
        self.drop_cache()
        self._shape = [m if m["role"] != "assistant" else {**m, "content": _ANSWER} for m in self.messages]
        self._next_shape(user, render(self.tokenizer, [*self._shape, user]))
        return with_bos(self.tokenizer, encode_rendered(self.tokenizer, render(self.tokenizer, [*self.messages, user])))

    def _next_shape(self, user: dict[str, str], rendered: str) -> None:
        self._rendered = rendered
        self._shape += [user, {"role": "assistant", "content": _ANSWER}]

    @torch.no_grad()
    def _answer(self, ids: list[int], stream: _Stream) -> str:
        _check_ids(self.model, ids)
        logits = _CheckLogits()(None, self._read(ids))
        stream.start(prompt=False)
        answer: list[int] = []
        while not answer or (answer[-1] not in self._ends and len(answer) < self.max_new_tokens):
            if answer:
                logits = self._step(answer[-1])
            answer.append(self.pick(logits))
            stream.put(torch.tensor(answer[-1:]))
        stream.end()
        self._unread = answer[-1:]
        self.stats.tokens_per_s = len(answer) / (stream.times[-1] - stream.started)
        return _text(self.tokenizer, answer, special=False)

    def _step(self, token: int) -> Tensor:
        """`_read` of one token, through a CUDA graph where that is possible."""
        if self._decoder is None:
            if not steps_are_faster(self.model):
                return self._read([token])
            self._decoder = StreamDecoder(self.model, self._cache)
        self.stats.tokens += 1
        return self._decoder.step(torch.tensor([[token]], device=self.model.device)).float()

    def _read(self, ids: list[int]) -> Tensor:
        """Feeds `ids` in chunks; returns fp32 logits (1, vocabulary) after the last one."""
        for chunk in torch.tensor([ids], device=self.model.device).split(CHUNK, dim=1):
            kwargs = with_cache(self.model, self._cache)
            output = self.model(input_ids=chunk, use_cache=True, logits_to_keep=1, **kwargs)
            self._cache = cache_of(output)
        self.stats.tokens += len(ids)
        return output.logits[:, -1].float()


class _Picker:
    """Picks the next token from logits (1, vocabulary), greedily or by sampling."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.warpers = None
        if sampling.temperature:
            self.warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
            self.random = torch.Generator(device)
            self.random.manual_seed(sampling.seed) if sampling.seed is not None else self.random.seed()

    def __call__(self, logits: Tensor) -> int:
        if self.warpers is None:
            return int(logits.argmax(-1))
        scores = self.warpers(torch.empty(1, 0, dtype=torch.long, device=logits.device), logits)  # type: ignore[arg-type]
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.random))


class _Stream(TextStreamer):
    """Passes text on in whole words, and records the time of each token (reading a token waits for the device)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.on_text = on_text
        self.times: list[float] = []

    def start(self, *, prompt: bool = True) -> None:
        """Starts the clock; `prompt`: whether the first tokens are the prompt, as `generate` sends them."""
        self.next_tokens_are_prompt = prompt
        self.started = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.on_text is not None and text:
            self.on_text(text)


class _CheckLogits(LogitsProcessor):
    """Returns scores unchanged; raises `LongspanError` where those after the prompt are not numbers."""

    def __init__(self) -> None:
        self.checked = False

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:  # type: ignore[override]
        if not self.checked and bool(scores.isnan().any()):
            raise LongspanError(
                "the model's scores are not numbers: its weights are damaged, or too large for this dtype; try float32"
            )
        self.checked = True
        return scores


def _check_ids(model: PreTrainedModel, ids: list[int]) -> None:
    rows = text_config(model.config).vocab_size
    if max(ids) >= rows:
        raise LongspanError(
            f"the tokenizer has token {max(ids):,} and the model only {rows:,}: they do not belong together; copy the "
            "tokenizer from the model's source"
        )


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special))
