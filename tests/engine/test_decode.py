"""Decoding in steps of fixed shape against one forward over everything, on every way in."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel

import dense
from longspan.apply import apply
from longspan.memory.streaming import StreamingLLM
from longspan.reading.stream_decoder import StreamDecoder, steps_are_faster, stream_generate
from longspan.util.errors import NotSupported

LENGTH = 60
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return apply(dense.llama(layers=3), StreamingLLM(4, 10))


def small(model_type: str, **settings: object) -> PreTrainedModel:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **settings})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return model


def decoded(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of the tokens past the cache, step by step."""
    decoder = StreamDecoder(model, cache, graph=False)
    start = cache.get_seq_length()
    return torch.stack([decoder.step(ids[:, t : t + 1]).clone() for t in range(start, ids.shape[1])], dim=1)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("phi", {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"num_key_value_heads": None}),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}),
        ("stablelm", {}),
        ("qwen3", {"head_dim": 16}),
        ("glm4", {"head_dim": 16}),
        (
            "gemma2",
            {"head_dim": 16, "sliding_window": 64, "attn_logit_softcapping": 1.0, "attn_implementation": "eager"},
        ),
        ("gemma3_text", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ],
)
@pytest.mark.parametrize("prompt", [5, 30], ids=["before the ring is full", "after"])
def test_steps_equal_one_forward(model_type: str, settings: dict, prompt: int) -> None:
    model = apply(small(model_type, **settings), StreamingLLM(4, 10))
    ids, cache = dense.tokens(2, LENGTH), DynamicCache()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        model(ids[:, :prompt], past_key_values=cache)
    torch.testing.assert_close(decoded(model, ids, cache), whole[:, prompt:], **CLOSE)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("positions", ["given", "left out"])
def test_padded_rows(sinks: int, positions: str) -> None:
    """However the prompt's positions came about."""
    model = apply(dense.llama(layers=3), StreamingLLM(sinks, 10))
    ids, cache = dense.tokens(2, LENGTH), DynamicCache()
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :8] = 0
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions == "given" else {}
    with torch.no_grad():
        model(ids[:, :30], attention_mask=mask, past_key_values=cache, **extra)
        alone = model(ids[:1, 8:], use_cache=False).logits[0], model(ids[1:], use_cache=False).logits[0]
    got = decoded(model, ids, cache)
    torch.testing.assert_close(got[0], alone[0][22:], **CLOSE)
    torch.testing.assert_close(got[1], alone[1][30:], **CLOSE)


def test_padded_rows_longer_than_the_window() -> None:
    """The ring is full long before every row has begun."""
    model = apply(dense.llama(layers=2), StreamingLLM(3, 5))
    ids, mask, cache = dense.tokens(2, LENGTH), torch.ones(2, 21, dtype=torch.long), DynamicCache()
    mask[0, :20] = 0
    with torch.no_grad():
        model(ids[:, :21], attention_mask=mask, past_key_values=cache)
        alone = model(ids[:1, 20:], use_cache=False).logits[0]
    torch.testing.assert_close(decoded(model, ids, cache)[0], alone[1:], **CLOSE)


def test_tokens_in_every_form(model: LlamaForCausalLM) -> None:
    """step, greedy and stream give what generate gives, and the cache goes on after them."""
    ids = dense.tokens(2, 9)
    want = model.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))

    def start() -> tuple[StreamDecoder, Tensor]:
        cache = DynamicCache()
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        return StreamDecoder(model, cache, graph=False), ids[:, -1:]

    decoder, last = start()
    assert torch.equal(decoder.greedy(last, 25), want[:, 9:])
    with torch.no_grad():
        more = model(want[:, -1:], past_key_values=decoder.cache).logits
        torch.testing.assert_close(more, model(want, use_cache=False).logits[:, -1:], **CLOSE)
    decoder, last = start()
    assert torch.equal(torch.cat(list(itertools.islice(decoder.stream(last), 25)), dim=1), want[:, 9:])
    decoder, last = start()
    for t in range(9, 34):
        last = decoder.step(last).argmax(-1, keepdim=True)
        assert torch.equal(last, want[:, t : t + 1])


def test_a_second_decoder_goes_on(model: LlamaForCausalLM) -> None:
    """Turns of a chat: decoder, prompt, decoder, on one cache."""
    ids, cache = dense.tokens(1, LENGTH), DynamicCache()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        model(ids[:, :20], past_key_values=cache)
        torch.testing.assert_close(decoded(model, ids[:, :30], cache), whole[:, 20:30], **CLOSE)
        got = model(ids[:, 30:45], past_key_values=cache).logits
        torch.testing.assert_close(got, whole[:, 30:45], **CLOSE)
        torch.testing.assert_close(decoded(model, ids, cache), whole[:, 45:], **CLOSE)


def test_refusals(model: LlamaForCausalLM) -> None:
    ids = dense.tokens(1, 20)
    plain = dense.llama()
    with pytest.raises(NotSupported, match="needs a model with streaming on it"):
        StreamDecoder(plain, plain(ids).past_key_values)
    with pytest.raises(NotSupported, match="run the prompt first"):
        StreamDecoder(model, DynamicCache())
    near = apply(small("mistral", sliding_window=6), StreamingLLM(4, 10))
    with pytest.raises(NotSupported, match="attend to the last 6 tokens only"):
        StreamDecoder(near, near(ids).past_key_values)


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 20}])
@pytest.mark.parametrize("chunk", [None, 7])
def test_generate_through_steps(model: LlamaForCausalLM, sampling: dict, chunk: int | None) -> None:
    """The tokens of transformers' own loop, padded rows and ends of text among them."""
    ids = dense.tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    made = []
    for settings in ({}, {"custom_generate": stream_generate}):
        torch.manual_seed(5)
        made.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=30,
                pad_token_id=0,
                eos_token_id=list(range(1, 9)),
                prefill_chunk_size=chunk,
                **sampling,
                **settings,
            )
        )
    assert torch.equal(*made)


def test_generate_goes_on_from_a_cache(model: LlamaForCausalLM) -> None:
    ids, cache = dense.tokens(1, 30), DynamicCache()
    whole = model.generate(ids, max_new_tokens=12, pad_token_id=0)
    with torch.no_grad():
        model(ids[:, :17], past_key_values=cache)
    cut = model.generate(ids, past_key_values=cache, max_new_tokens=12, pad_token_id=0, custom_generate=stream_generate)
    assert torch.equal(cut, whole)


def test_generate_refuses_beams(model: LlamaForCausalLM) -> None:
    with pytest.raises(NotSupported, match="leave out custom_generate"):
        model.generate(dense.tokens(1, 9), num_beams=2, max_new_tokens=3, custom_generate=stream_generate)


def test_the_model_may_read_between_steps(model: LlamaForCausalLM) -> None:
    """As a chat does with each new turn."""
    ids, cache = dense.tokens(2, LENGTH), DynamicCache()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        model(ids[:, :20], past_key_values=cache)
        decoder = StreamDecoder(model, cache)
        for begin in (20, 40):
            for t in range(begin, begin + 10):
                torch.testing.assert_close(decoder.step(ids[:, t : t + 1]), whole[:, t], **CLOSE)
            out = model(ids[:, begin + 10 : begin + 20], past_key_values=cache).logits
            torch.testing.assert_close(out, whole[:, begin + 10 : begin + 20], **CLOSE)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
def test_a_graph_replays_the_same(compile: bool) -> None:
    """Steps, a chat's turn between them, and `generate`, all from one recorded graph."""
    model = apply(dense.llama(layers=3), StreamingLLM(4, 10)).to("cuda")
    ids, cache = dense.tokens(2, LENGTH).to("cuda"), DynamicCache()
    assert steps_are_faster(model)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        model(ids[:, :20], past_key_values=cache)
        decoder = StreamDecoder(model, cache, compile=compile)
        for begin in (20, 40):
            for t in range(begin, begin + 10):
                torch.testing.assert_close(decoder.step(ids[:, t : t + 1]), whole[:, t], rtol=1e-3, atol=1e-3)
            model(ids[:, begin + 10 : begin + 20], past_key_values=cache)
    settings = {"max_new_tokens": 40, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        model.generate(ids, custom_generate=stream_generate, **settings), model.generate(ids, **settings)
    )
