"""The table method × way to run a model's forwards: several at once, one within another, around an image, computed again.

Every cell is a check of this file: it compares with the same forwards by themselves and asserts equality, or ends in the
`NotSupported` with which the method refuses.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import torch
from matrix import FORWARDS, LINES, PAGE, Line
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from longspan.apply import apply
from longspan.attention import trained
from longspan.core.facts import decoder_of, facts_of
from longspan.core.method import catalogue, combination, parse
from longspan.hf import compat
from longspan.hf.site import remove
from longspan.memory import streaming
from longspan.memory.rmt import RMT, around
from longspan.positions import near_far, spans
from longspan.util.errors import LongspanError, NotSupported

INTRODUCTION = """
On tiny random models, each cell tested (`tests/conformance/test_forwards.py`): equal to the same forwards on their own, or
refused for the reason below.
"""
WINDOW, LENGTH = 40, 46
GIST, LANDMARK, IMAGE = 127, 126, 125
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Logits are about 1.5 wide; a key seen wrongly moves them by 1e-2 and more."""
_SIZES: dict[str, Any] = {**families._SIZES, "num_hidden_layers": 2, "max_position_embeddings": WINDOW}

TRAINED = (
    Line("performer:features=32", ""),
    Line("gist:id=127", "gist:id=127"),
    Line("landmark:block=4,retrieve=2,local=8", "landmark:block=10,retrieve=1,local=10"),
    Line("rmt:tokens=2,segment=8", ""),
)
"""Methods for models that are tuned with them. An empty `neutral`: there are no settings under which nothing changes."""
ENCODER_DECODER = Line("unlimiformer:k=6", "unlimiformer")
ROWS = (*LINES, *TRAINED, ENCODER_DECODER)


# Models and inputs


def _wide(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return model.eval()


@functools.cache
def _made(family: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    more = {k: v[:2] if k == "layer_types" else v for k, v in families.FAMILIES.get(family, {}).items()}
    config = AutoConfig.for_model(family, **{**_SIZES, **more, **{k: json.loads(v) for k, v in settings.items()}})
    model = _wide(AutoModelForCausalLM.from_config(config))
    model.config.gist_token_id, model.config.landmark_token_id = GIST, LANDMARK
    return model


def build(family: str = "llama", **settings: Any) -> PreTrainedModel:
    """A model of two layers whose logits answer to every key."""
    return copy.deepcopy(_made(family, **{k: json.dumps(v) for k, v in settings.items()}))


@functools.cache
def _bart() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_layers": 2, "decoder_layers": 2, "d_model": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": WINDOW}
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(
        "bart", **sizes, **heads, **tokens, decoder_start_token_id=2, forced_eos_token_id=None, dropout=0.0
    )
    return _wide(AutoModelForSeq2SeqLM.from_config(config))


def put(model: PreTrainedModel, spec: str) -> PreTrainedModel:
    """The model with the method on it; RMT makes another model around it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, value in (("ones", 1.0), ("twos", 2.0)):
            rope = facts_of(model).rope
            (Path(folder) / f"{name}.json").write_text(json.dumps([value] * (rope.dim // 2 if rope else 8)))
            spec = spec.replace(f"{{{name}}}", str(Path(folder) / f"{name}.json"))
        methods = combination(spec)
        for method in methods.methods:
            if isinstance(method, RMT):
                method.check(facts_of(model))
                torch.manual_seed(0)
                return around(model, method).train(model.training)
        return apply(model, methods)


def tokens(rows: int, length: int, seed: int = 0, *, gist: bool = True) -> Tensor:
    """(rows, length) ids; the seventh is a gist token, which is an ordinary one to other methods."""
    ids = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 6:7] = GIST if gist else 9
    return ids


def padded(length: int, pad: int, seed: int = 0) -> dict[str, Tensor]:
    """Two rows, the first with `pad` tokens of padding on its left."""
    ids, mask = tokens(2, length, seed), torch.ones(2, length, dtype=torch.long)
    mask[0, :pad] = 0
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def logits(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(**arguments).logits


def same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, **CLOSE)


# Columns


def _gradients(model: PreTrainedModel, forwards: list[dict[str, Tensor]], weights: list[Tensor]) -> list[Tensor]:
    """Of all parameters, from one backward of the sum over several forwards."""
    model.zero_grad()
    sum((model(**f).logits * w).sum() for f, w in zip(forwards, weights, strict=True)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def _checkpointed(spec: str, family: str, forwards: list[dict[str, Tensor]]) -> None:
    model = put(_bart_copy() if family == "bart" else build(family), spec).train()
    weights = [_weights(f, seed) for seed, f in enumerate(forwards)]
    # What is computed again is of the last forward first, when all have run.
    expected = _gradients(model, forwards, weights)
    assert max(g.abs().max() for g in expected) > 0.1
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = _gradients(model, forwards, weights)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        model.gradient_checkpointing_disable()


def _weights(forward: dict[str, Tensor], seed: int) -> Tensor:
    """What the logits of a forward are multiplied by in its loss: nothing where there is padding."""
    ids = forward.get("decoder_input_ids", forward["input_ids"])
    made = torch.randn(*ids.shape, families.VOCABULARY, generator=torch.Generator().manual_seed(seed)) / 10
    return made * forward["attention_mask"][..., None] if "attention_mask" in forward else made


def _bart_copy() -> PreTrainedModel:
    return copy.deepcopy(_bart())


def checkpointed(spec: str, family: str = "llama") -> None:
    if _encoder_decoder(spec):
        forwards = [{"input_ids": tokens(2, 30, n), "decoder_input_ids": tokens(2, 9, n + 5)} for n in (0, 1)]
        _checkpointed(spec.replace("k=6", "k=6,training=retrieval"), "bart", forwards)
    else:
        _checkpointed(spec, family, [padded(30, 5, 0), padded(30, 9, 1)])


def jumping(spec: str) -> None:
    """PoSE: positions that jump, with an attention mask of ones, beside ordinary ones."""
    places = torch.arange(30)[None].repeat(2, 1)
    jumps = places + torch.tensor([[9], [4]]) * (places >= 11) + torch.tensor([[0], [2]]) * (places >= 20)
    ones = torch.ones_like(places)
    forwards = [
        {"input_ids": tokens(2, 30, n), "position_ids": p, "attention_mask": ones}
        for n, p in enumerate((jumps, places))
    ]
    _checkpointed(spec, "llama", forwards)


def threads(spec: str) -> None:
    """Four threads, three texts each, all different in length and content."""
    torch.set_num_threads(1)
    model = put(_bart_copy() if _encoder_decoder(spec) else build(), spec)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    prompts = [tokens(1, 22 + 2 * n, n) for n in range(12)]
    alone = [model.generate(ids, **settings) for ids in prompts]
    got: dict[int, Any] = {}

    def work(first: int) -> None:
        for number in range(first, 12, 4):
            try:
                got[number] = model.generate(prompts[number], **settings)
            except Exception as error:
                got[number] = error

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, expected in enumerate(alone):
        if isinstance(got[number], Exception):
            raise got[number]
        assert torch.equal(got[number], expected), f"text {number} under {spec}"


def alternating(spec: str) -> None:
    """Two caches, chunk by chunk in turns; each row is padded in its own way."""
    if _encoder_decoder(spec):
        _alternating_answers(spec)
    else:
        _alternating_texts(spec)


def _alternating_texts(spec: str) -> None:
    model = put(build(), spec)
    texts = [padded(LENGTH, 3, 0), padded(LENGTH, 8, 1)]
    cuts = [(0, 11, 12, 30, 31, LENGTH), (0, 9, 20, 33, 45, LENGTH)]

    def run(turns: list[int]) -> list[Tensor]:
        caches, parts, at = [_empty(model), _empty(model)], ([], []), [0, 0]
        for n in turns:
            begin, end = cuts[n][at[n] : at[n] + 2]
            at[n] += 1
            piece = {k: v[:, :end] if k == "attention_mask" else v[:, begin:end] for k, v in texts[n].items()}
            output = _read(model, caches[n], **piece)
            caches[n] = compat.cache_of(output)
            parts[n].append(output.logits)
        return [torch.cat(p, dim=1)[t["attention_mask"].bool()] for p, t in zip(parts, texts, strict=True)]

    same(run([0, 1] * 5), run([0] * 5 + [1] * 5))


def _alternating_answers(spec: str) -> None:
    model = put(_bart_copy(), spec)
    texts, answers = [tokens(1, 60, 0), tokens(1, 70, 1)], [tokens(1, 8, 2), tokens(1, 8, 3)]

    @torch.no_grad()
    def run(turns: list[int]) -> list[Tensor]:
        read: list[Any] = [None, None]
        parts, at = ([], []), [0, 0]
        for n in turns:
            step = slice(at[n], at[n] + 4)
            at[n] += 4
            given = {"encoder_outputs": model.get_encoder()(input_ids=texts[n])}
            cache = {} if read[n] is None else compat.with_cache(model, compat.cache_of(read[n]))
            read[n] = model(**given, decoder_input_ids=answers[n][:, step], use_cache=True, **cache)
            parts[n].append(read[n].logits)
        return [torch.cat(p, dim=1) for p in parts]

    same(run([0, 1, 0, 1]), run([0, 0, 1, 1]))


def _empty(model: PreTrainedModel) -> Any:
    return None if model.config.model_type == "longspan-rmt" else DynamicCache(config=model.config)


@torch.no_grad()
def _read(model: PreTrainedModel, cache: Any, **arguments: Any) -> Any:
    return model(use_cache=True, **arguments, **({} if cache is None else compat.with_cache(model, cache)))


class Twice(nn.Module):
    """A model around another, which it calls twice, the second time within the first: before the inner one's last layer."""

    def __init__(self, inner: PreTrainedModel, layer: nn.Module):
        super().__init__()
        self.inner, self.layer = inner, [layer]

    def forward(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> list[Tensor]:
        made: list[Tensor] = []

        def again(*_: Any) -> None:
            handle.remove()
            made.append(self.inner(**second).logits)

        handle = self.layer[0].register_forward_pre_hook(again)
        return [self.inner(**first).logits, *made]


def nested(spec: str) -> None:
    """See `Twice`."""
    if _encoder_decoder(spec):
        model = put(_bart_copy(), spec)
        first, second = ({"input_ids": tokens(2, 60, n), "decoder_input_ids": tokens(2, 9 + n, n)} for n in (0, 1))
    else:
        model = put(build(), spec)
        first, second = padded(LENGTH, 3, 0), padded(LENGTH - 5, 8, 1)
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2][-1]
    with torch.no_grad():
        got = Twice(model, layers[-1])(first, second)
    for logit, arguments in zip(got, (first, second), strict=True):
        real = arguments["attention_mask"].bool() if "attention_mask" in arguments else ...
        same(logit[real], logits(model, **arguments)[real])


# Models around an image

_EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


def _llava(text: PreTrainedModel) -> PreTrainedModel:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 8, "projection_dim": 32, **_EYE},
            text_config=text.config.to_dict(),
            image_token_index=IMAGE,
            image_seq_length=4,
            vision_feature_select_strategy="default",
            vision_feature_layer=-1,
        )
    )


def _gemma3(text: PreTrainedModel) -> PreTrainedModel:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config={"model_type": "siglip_vision_model", "image_size": 16, **_EYE},
            text_config=text.config.to_dict(),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=124,
            eoi_token_index=123,
        )
    )


def _qwen2_vl(text: PreTrainedModel) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    eye = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 1}
    special = {"image_token_id": IMAGE, "vision_start_token_id": 124, "vision_end_token_id": 123, "video_token_id": 122}
    settings = {**text.config.to_dict(), "model_type": "qwen2_vl_text", "rope_parameters": rope}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=eye, text_config=settings, **special))


def _sight(family: str, ids: Tensor) -> dict[str, Tensor]:
    """A picture of four tokens, as each family is given it."""
    image = torch.randn(1, 3, 16, 16)
    if family == "qwen2":
        marks = {"mm_token_type_ids": (ids == IMAGE).long(), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        return {"pixel_values": image.view(16, -1).repeat(1, 2), **marks}
    if family == "gemma3_text":
        return {"pixel_values": image, "token_type_ids": (ids == IMAGE).long()}
    return {"pixel_values": image[:, :, :8, :8]}


@functools.cache
def wrapped(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    text = build(family)
    model = {"gemma3_text": _gemma3, "qwen2": _qwen2_vl, "llama": _llava}[family](text)
    _wide(model)
    model.get_decoder().load_state_dict(text.base_model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.config.gist_token_id, model.config.landmark_token_id = GIST, LANDMARK
    for part in model.modules():  # so that it is seen whose implementation is put back
        if "Vision" in type(part).__name__ and isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    return text, model.eval()


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    return {n: m.config._attn_implementation for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}


@contextlib.contextmanager
def _few_queries_at_once() -> Iterator[None]:
    files = (near_far, spans, trained, streaming)
    before = [file.QUERIES_AT_ONCE for file in files]
    try:
        for file in files:
            file.QUERIES_AT_ONCE = 3
        yield
    finally:
        for file, count in zip(files, before, strict=True):
            file.QUERIES_AT_ONCE = count


def image(line: Line, family: str) -> None:
    """A picture before a text: nothing changes under neutral settings; the method gives what it gives on the text model alone
    for the same embeddings, and for a text; the vision tower is left alone, and everything comes off again."""
    text, model = copy.deepcopy(wrapped(family))
    before = _implementations(model)
    ids = tokens(1, 12, gist=False)
    ids[0, 1:5] = IMAGE
    ids[0, 0] = 124
    sight = _sight(family, ids)
    stock = logits(model, input_ids=ids, **sight)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    if line.neutral:
        put(model, line.neutral)
        for arguments in ({}, {"use_cache": False}):
            with _few_queries_at_once():  # so that an image is cut
                same(logits(model, input_ids=ids, **sight, **arguments), stock)
    put(model, line.spec)
    now = _implementations(model)
    assert all(now[n] == before[n] for n in now if "vision" in n and n), "the vision tower is another"
    words = tokens(1, LENGTH)
    put(text, line.spec)
    same(logits(model, input_ids=words), logits(text, input_ids=words))
    more = torch.cat((ids, tokens(1, 30, 1)), dim=1)
    if family == "llama":
        seen = _embeddings(model, more, sight)
        same(logits(model, input_ids=more, **sight), logits(text, inputs_embeds=seen))
    else:
        longer = {**_sight(family, more), "pixel_values": sight["pixel_values"]}
        whole = logits(model, input_ids=more, **longer)
        with _few_queries_at_once():
            same(logits(model, input_ids=more, **longer), whole)
    remove(model)
    assert _implementations(model) == before
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert torch.equal(logits(model, input_ids=ids, **sight), stock)


@torch.no_grad()
def _embeddings(model: Any, ids: Tensor, sight: dict[str, Any]) -> Tensor:
    """What the decoder of a LLaVA is given."""
    seen: list[Tensor] = []
    decoder = decoder_of(model)
    handle = decoder.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    model(input_ids=ids, **sight)
    handle.remove()
    return seen[0]


def packed(spec: str) -> None:
    """Two documents in a row, told apart by positions that begin again."""
    model = put(build(), spec)
    documents = [tokens(1, LENGTH, 0), tokens(1, 17, 1)]
    places = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    got = logits(model, input_ids=torch.cat(documents, dim=1), position_ids=places, use_cache=False)
    same(got, torch.cat([logits(model, input_ids=d, use_cache=False) for d in documents], dim=1))


def longrope(line: Line) -> None:
    """Past the length at which Phi-3's other factors begin: in one piece, and token by token from there."""
    pairs = 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0 + n / 8 for n in range(pairs)], "long_factor": [1.5 + n for n in range(pairs)]}
    _as_stock(line, build("phi3", rope_parameters=rope, original_max_position_embeddings=16), steps=True)


def dynamic(line: Line) -> None:
    """Past the window of a `dynamic` rotary module, whose base is that of the longest text so far."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    _as_stock(line, build("llama", rope_parameters=rope, max_position_embeddings=16), steps=False)


def _as_stock(line: Line, model: PreTrainedModel, *, steps: bool) -> None:
    length = min(36, _neutral_length(line.neutral, model))
    ids = tokens(2, length, gist=False)
    stock, short = logits(model, input_ids=ids, use_cache=False), logits(model, input_ids=ids[:, :12])
    put(model, line.neutral)
    same(logits(model, input_ids=ids, use_cache=False), stock)
    same(logits(model, input_ids=ids[:, :12]), short)
    if steps:
        cache, begin = _empty(model), length - 5
        parts = [_read(model, cache, input_ids=ids[:, :begin]).logits]
        parts += [_read(model, cache, input_ids=ids[:, t : t + 1]).logits for t in range(begin, length)]
        same(torch.cat(parts, dim=1), stock)
    put(model, line.spec)
    logits(model, input_ids=ids)


def _neutral_length(spec: str, model: PreTrainedModel) -> int:
    """How many tokens of Phi-3's and Llama's window a neutral method reads as the model does."""
    if "{" in spec or parse(spec).methods[0].exportable:
        return 36
    return min(m.neutral_length() for m in parse(spec).resolve(facts_of(model)).methods if not m.exportable)


def foreign(line: Line) -> None:
    """All four ways to read a cache under something else than what filled it are refused."""
    other = "yarn:factor=4" if line.spec.startswith("ntk") else "ntk:factor=2"
    model = build()
    for first, second in (("none", line.spec), (line.spec, "none"), (other, line.spec), (line.spec, other)):
        cache = DynamicCache(config=model.config)
        _read(put(model, first), cache, input_ids=tokens(1, 45))
        put(model, second)
        try:
            _read(model, cache, input_ids=tokens(1, 3, 1))
        except NotSupported:
            continue
        raise AssertionError(f"a cache that was filled under {first} is read under {second} without a word")
    raise NotSupported("a cache is read on by the method that filled it, and by no other")


@dataclass(frozen=True)
class Column:
    """title: in the table; says: what it means, below it; only: the rows that have it."""

    title: str
    says: str
    check: Callable[[Line], None]
    only: Callable[[Line], bool] = lambda line: True

    @property
    def name(self) -> str:
        """A name for tests."""
        return re.sub(r"[^a-z0-9-]+", "-", self.title.lower())


def _encoder_decoder(spec: str) -> bool:
    return spec.startswith("unlimiformer")


def _decoder(line: Line) -> bool:
    return not _encoder_decoder(line.spec)


def _one_model(line: Line) -> bool:
    """RMT is another model around the model."""
    return _decoder(line) and not line.spec.startswith("rmt")


def _neutral(line: Line) -> bool:
    return _one_model(line) and bool(line.neutral)


COLUMNS = (
    Column(
        "checkpointed",
        "gradients of two forwards with different left padding, from one backward, with and without gradient checkpointing "
        "(reentrant or not), on Llama",
        lambda line: checkpointed(line.spec),
    ),
    Column(
        "checkpointed, StableLM",
        "the same on layers that drop keyword arguments",
        lambda line: checkpointed(line.spec, "stablelm"),
        _decoder,
    ),
    Column(
        "checkpointed, PoSE",
        "the same with positions that skip, under an attention mask of ones",
        lambda line: jumping(line.spec),
        _decoder,
    ),
    Column(
        "threads", "four threads that generate twelve texts on one model", lambda line: threads(line.spec), _decoder
    ),
    Column("in turns", "two caches, chunk by chunk, alternately", lambda line: alternating(line.spec)),
    Column("nested", "a forward within a forward, between two layers", lambda line: nested(line.spec)),
    Column(
        "LLaVA",
        "with an image: the stock model under neutral settings, the text model alone under others; the vision tower keeps its "
        "attention",
        lambda line: image(line, "llama"),
        _one_model,
    ),
    Column(
        "Gemma 3",
        "the same where tokens of an image see one another",
        lambda line: image(line, "gemma3_text"),
        _one_model,
    ),
    Column(
        "Qwen2-VL",
        "the same where tokens have positions in time, height and width",
        lambda line: image(line, "qwen2"),
        _one_model,
    ),
    Column(
        "packed",
        "documents in one row, whose positions start at 0 in each",
        lambda line: packed(line.spec),
        _decoder,
    ),
    Column(
        "longrope",
        "the stock model, under neutral settings, where Phi-3's factors change with the length",
        longrope,
        _neutral,
    ),
    Column("dynamic", "the same past the window of a `dynamic` base", dynamic, _neutral),
    Column(
        "other cache",
        "a cache of the plain model or of another method, and the method's cache under another one or after `remove`",
        foreign,
        _one_model,
    ),
)


def goes_on_a_model(name: str) -> bool:
    """Whether a method of the catalogue can be put on models that were trained without it."""
    works_on = catalogue()[name].works_on
    return any(kind in works_on for kind in ("pretrained", "trained model", "encoder-decoders"))


def outcome(line: Line, column: Column) -> str:
    """`equal`, the reason of a refusal, or `–` where the row has no such cell. Raises `AssertionError` for what is wrong."""
    if not column.only(line):
        return "–"
    try:
        column.check(line)
    except LongspanError as error:
        said = " ".join(str(error).split())
        said = re.sub(r"\b\w+For(CausalLM|ConditionalGeneration)\b", "the model", said)
        one = rf"({'|'.join(catalogue())})(:[^ :]+)?"
        return re.sub(rf"^{one}( \+ {one})*(?=:? )", "the method", said)
    return "equal"


# The page


def section() -> str:
    """The table in Markdown, with what its columns mean and the reasons of refusals."""
    reasons: list[str] = []
    rows = [f"| | {' | '.join(column.title for column in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for line in ROWS:
        cells = []
        for column in COLUMNS:
            cell = outcome(line, column)
            if cell not in ("equal", "–"):
                if cell not in reasons:
                    reasons.append(cell)
                cell = f"refused ({reasons.index(cell) + 1})"
            cells.append(cell)
        rows.append(f"| `{line.title}` | {' | '.join(cells)} |")
    meanings = [f"- {column.title}: {column.says}" for column in COLUMNS]
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([FORWARDS, INTRODUCTION, *rows, "", *meanings, "", *notes])


@functools.cache
def _page() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Cells by row, reasons by number."""
    lines = PAGE.read_text().partition(FORWARDS)[2].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    notes = dict(line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))
    return {row[0]: row[1:] for row in rows}, notes


def documented(line: Line, column: Column) -> str:
    """What the page says of a cell: `equal`, `–`, or the reason of its refusal."""
    cells, notes = _page()
    row = cells.get(f"`{line.title}`", [])
    if len(row) != len(COLUMNS):
        return "nothing: write the page again"
    cell = row[COLUMNS.index(column)]
    number = re.fullmatch(r"refused \((\d+)\)", cell)
    return notes[number[1]] if number else cell
