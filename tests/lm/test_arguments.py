"""What the forwards of our own models take: the KV cache by either of its names, and no keyword that they do not know."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schemes import SIZES, tokens
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, LlamaConfig, PreTrainedModel
from transformers.utils import logging

import longspan as ls
import tiny
from longspan.hf import compat
from longspan.lm import (
    LongspanConfig,
    LongspanForCausalLM,
    LongspanForConditionalGeneration,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
    LongspanModel,
)
from longspan.memory.rmt import RMTConfig, RMTForCausalLM, RMTModel


def ours(cls: type[PreTrainedModel], kind: str = "decoder", **settings: Any) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        return cls(LongspanConfig(kind=kind, **{**SIZES, **settings})).eval()

    return make


def rmt(cls: type[PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        sizes = {**SIZES, "decoder_start_token_id": None}
        return cls(RMTConfig(LlamaConfig(**sizes), tokens=3, segment=8)).eval()

    return make


DECODERS = {
    "stack": ours(LongspanModel),
    "sink": ours(LongspanModel, sink="learned"),
    "causal": ours(LongspanForCausalLM),
    "classifier": ours(LongspanForSequenceClassification),
    "encoder-decoder": ours(LongspanForConditionalGeneration, "encoder-decoder"),
    "rmt stack": rmt(RMTModel),
    "rmt": rmt(RMTForCausalLM),
}
OTHERS = {
    "encoder": ours(LongspanModel, "encoder"),
    "masked": ours(LongspanForMaskedLM, "encoder"),
    "classifying encoder": ours(LongspanForSequenceClassification, "encoder"),
}


def inputs(model: PreTrainedModel, new: Tensor) -> dict[str, Tensor]:
    if model.config.is_encoder_decoder:
        return {"input_ids": tokens(2, 9), "decoder_input_ids": new}
    return {"input_ids": new}


def empty(model: PreTrainedModel) -> Cache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if model.config.is_encoder_decoder else DynamicCache()


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_the_cache_goes_by_either_name(name: str) -> None:
    """Given in two pieces by each name it is the same and is what the output holds; by both names it is refused."""
    model, ids, found = DECODERS[name](), tokens(2, 20), []
    for argument in compat.CACHE_NAMES:
        cache = empty(model)
        for new in (ids[:, :13], ids[:, 13:]):
            out = model(**inputs(model, new), use_cache=True, **{argument: cache})
            if name != "classifier":  # whose outputs have no cache
                assert compat.cache_of(out) is cache and out[compat.CACHE] is cache
        assert cache.get_seq_length() == 20 + (name == "sink")
        found.append(out[0])
    assert torch.equal(*found)
    given = {argument: empty(model) for argument in compat.CACHE_NAMES}
    with pytest.raises(ValueError, match="given twice, as cache= and as past_key_values="):
        model(**inputs(model, ids), **given)
    if name != "classifier":  # one text and its continuation are not read as if each began
        assert not torch.allclose(found[0], model(**inputs(model, ids[:, 13:]))[0], atol=1e-3)


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
@torch.no_grad()
def test_a_keyword_that_is_not_known_is_refused(name: str) -> None:
    model = (DECODERS | OTHERS)[name]()
    for given in ({"past_key_value": DynamicCache()}, {"attn_mask": torch.ones(2, 9)}, {"whatever": None}):
        with pytest.raises(TypeError, match=f"has no keyword arguments {next(iter(given))}"):
            model(**inputs(model, tokens(2, 9)), **given)
    model(**inputs(model, tokens(2, 9)), return_dict=True)


def llama(method: str) -> Callable[[], PreTrainedModel]:
    return lambda: ls.apply(tiny.model(), method)


GENERATING = {
    "ours": ours(LongspanForCausalLM),
    "a pattern": ours(LongspanForCausalLM, attention="window:size=6"),
    "a mixer": ours(LongspanForCausalLM, attention="s4d:states=16", position="nope"),
    "a sink": ours(LongspanForCausalLM, sink="learned"),
    "encoder-decoder": ours(LongspanForConditionalGeneration, "encoder-decoder"),
    "rmt": rmt(RMTForCausalLM),
    **{
        method: llama(method)
        for method in (
            "streaming:sinks=2,window=6",
            "focused:local=8,layers=1",
            "self-extend:group=2,window=4",
            "performer:features=16",
            "window:size=9",
            "yarn:factor=2 + logn:window=6",
        )
    },
}


@pytest.mark.parametrize("name", GENERATING)
def test_no_old_name_comes_from_here(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Newer versions of transformers call the KV cache `cache`, and warn of `past_key_values` in arguments and outputs."""
    logger: Any = logging.get_logger("transformers")
    caplog.handler.setLevel("WARNING")
    logger.addHandler(caplog.handler)
    logging.warning_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            model, ids = GENERATING[name](), tokens(2, 20)
            asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            model.generate(ids, **asked)
            model.generate(ids, num_beams=2, return_dict_in_generate=True, **asked)
            with torch.no_grad():
                first = model(**inputs(model, ids[:, :13]), use_cache=True)
                rest = compat.with_cache(model, compat.cache_of(first))
                model(**inputs(model, ids[:, 13:]), **rest, use_cache=True)
            if not model.config.is_encoder_decoder:
                model.train()(ids, labels=ids).loss.backward()
            said = [str(w.message) for w in warned] + caplog.messages
            assert not [text for text in said if compat.OLD in text]
            if compat.CACHE == compat.NEW:  # and such a warning would have been seen
                first[compat.OLD]
                assert compat.OLD in caplog.messages[-1]
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", ["causal", "rmt", "encoder-decoder", "masked"])
def test_losses_of_batches_that_are_accumulated(name: str) -> None:
    """A Trainer says how many labels all of them have, and adds the losses."""
    model, ids = (DECODERS | OTHERS)[name](), tokens(2, 9)
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[0], [4]]), -100)
    count = int((labels if name in ("encoder-decoder", "masked") else labels[:, 1:]).ne(-100).sum())
    asked = {**inputs(model, ids), "labels": labels}
    mean, part = model(**asked).loss, model(**asked, num_items_in_batch=torch.tensor(20)).loss
    torch.testing.assert_close(part, mean * count / 20)
    assert LongspanForSequenceClassification.accepts_loss_kwargs is False


@torch.no_grad()
def test_an_encoder_decoder_gives_what_it_is_asked_for() -> None:
    model = DECODERS["encoder-decoder"]()
    out = model(**inputs(model, tokens(2, 7)), output_hidden_states=True)
    assert [len(out.encoder_hidden_states), len(out.decoder_hidden_states)] == [3, 3]
    assert out.encoder_hidden_states[-1].shape[1] == 9 and out.decoder_hidden_states[-1].shape[1] == 7
    said = model.generate(tokens(1, 9), max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert len(said.decoder_hidden_states) == len(said.sequences[0]) - 1 and len(said.encoder_hidden_states) == 3
