"""The names of transformers' versions, and what becomes of one that is not known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel

import dense
from longspan.apply import apply
from longspan.hf import compat
from longspan.hf.site import current
from longspan.util.errors import NotSupported


def test_a_models_own_signature_says_what_its_cache_is_called() -> None:
    class Old(torch.nn.Module):
        def forward(self, input_ids: Tensor, past_key_values: Any = None) -> None: ...

    class New(torch.nn.Module):
        def forward(self, input_ids: Tensor, cache: Any = None, **kwargs: Any) -> None: ...

    class Unknown(torch.nn.Module):
        def forward(self, input_ids: Tensor, memory: Any = None, **kwargs: Any) -> None: ...

    cache = DynamicCache()
    assert compat.with_cache(Old(), cache) == {"past_key_values": cache}
    assert compat.with_cache(New(), cache) == {"cache": cache}
    with pytest.raises(NotSupported, match=r"Unknown\.forward has no argument for a KV cache"):
        compat.with_cache(Unknown(), cache)
    with pytest.raises(ValueError, match="given twice"):
        compat.given_cache({"cache": cache, "past_key_values": cache})


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_the_cache_of_an_output_is_found_by_either_name(name: str) -> None:
    """A model's own output class may have the other name than the installed transformers."""
    cache = DynamicCache()
    assert compat.cache_of(SimpleNamespace(**{name: cache})) is cache
    assert compat.cache_of({name: cache}) is cache
    assert compat.cache_of(SimpleNamespace(logits=None)) is None


def test_installed_transformers_takes_and_gives_the_cache_by_these_names() -> None:
    model, ids = dense.llama(layers=2), dense.tokens(1, 12)
    cache = DynamicCache()
    output = model(ids[:, :8], use_cache=True, **compat.with_cache(model, cache))
    assert compat.cache_of(output) is cache and cache.get_seq_length() == 8
    rest = model(ids[:, 8:], use_cache=True, **compat.with_cache(model, cache))
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 8:])
    again = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, **{compat.CACHE: DynamicCache()})
    assert torch.equal(again, model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
@pytest.mark.parametrize("spec", ["streaming:sinks=2,window=6", "yarn:factor=2", "self-extend:group=2,window=4"])
def test_a_decoder_under_a_method_takes_its_cache_by_either_name(name: str, spec: str) -> None:
    model, ids = apply(dense.llama(layers=2), spec), dense.tokens(1, 20)
    whole = model.model(ids, use_cache=False).last_hidden_state
    cache = DynamicCache()
    parts = [model.model(part, use_cache=True, **{name: cache}).last_hidden_state for part in ids.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 20


class Renamed(LlamaModel):
    """A decoder of a version to come, whose cache has another name."""

    def forward(self, input_ids: Tensor | None = None, memory: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        for swallowed in compat.CACHE_NAMES:
            kwargs.pop(swallowed, None)
        return super().forward(input_ids, **{compat.CACHE: memory}, **kwargs)


@pytest.mark.parametrize(
    "spec", ["streaming:sinks=2,window=6", "self-extend:group=2,window=4", "logn:window=8", "focused:local=8"]
)
def test_a_renamed_cache_is_refused_and_never_swallowed(spec: str) -> None:
    model = dense.llama(layers=2)
    model.model.__class__ = Renamed
    with pytest.raises(NotSupported, match="has no argument for a KV cache"):
        apply(model, spec)
    assert current(model) is None and not model.model._forward_pre_hooks


def test_a_cache_that_is_lost_between_two_pieces_is_found_out() -> None:
    """A decoder that takes a cache and reads on without it."""

    class Forgetful(LlamaModel):
        def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
            if kwargs.get("longspan_forward") is not None:
                kwargs[compat.CACHE] = DynamicCache() if kwargs.get("use_cache") else None
            return super().forward(input_ids, **kwargs)

        forward.__signature__ = compat.inspect.signature(LlamaModel.forward)  # type: ignore[attr-defined]

    model = dense.llama(layers=2)
    model.model.__class__ = Forgetful
    with pytest.raises(NotSupported, match=r"read from a KV cache|misread"):
        apply(model, "window:size=16")
    assert current(model) is None and isinstance(model, LlamaForCausalLM)


SPECS = [
    "yarn:factor=2",
    "self-extend:group=2,window=4",
    "rerope:window=4",
    "dynamic-ntk",
    "streaming:sinks=2,window=30",
    "focused:local=8",
]


def _configured(model: LlamaForCausalLM, ids: Tensor) -> DynamicCache:
    return _read(model, DynamicCache(config=model.config), ids)


def _bare(model: LlamaForCausalLM, ids: Tensor) -> DynamicCache:
    """Of a cache that knows of no layer before the first forward."""
    return _read(model, DynamicCache(), ids)


def _models_own(model: LlamaForCausalLM, ids: Tensor) -> DynamicCache:
    return compat.cache_of(model(ids, use_cache=True))


def _in_training(model: LlamaForCausalLM, ids: Tensor) -> DynamicCache:
    """Or where the method keeps none in training, as usual."""
    cache = compat.cache_of(model.train()(ids, use_cache=True))
    model.eval()
    return _models_own(model, ids) if cache is None else cache


def _emptied(model: LlamaForCausalLM, ids: Tensor) -> DynamicCache:
    cache = _configured(model, ids.flip(1))
    cache.reset()
    return _read(model, cache, ids)


def _read(model: LlamaForCausalLM, cache: DynamicCache, ids: Tensor) -> DynamicCache:
    model(ids, use_cache=True, **compat.with_cache(model, cache))
    return cache


@pytest.mark.parametrize("fill", [_configured, _bare, _models_own, _in_training, _emptied])
@pytest.mark.parametrize("spec", SPECS)
def test_a_cache_goes_on_under_the_method_that_filled_it_alone(spec: str, fill: Callable) -> None:
    model, ids = dense.llama(layers=2), dense.tokens(2, 24)

    def filled(model: LlamaForCausalLM) -> DynamicCache:
        return fill(model, ids[:, :12])

    def goes_on(cache: DynamicCache) -> Tensor:
        return model(ids[:, 12:], use_cache=True, **compat.with_cache(model, cache)).logits

    plain = filled(model)
    apply(model, spec)
    own, again = filled(model), filled(model)
    with pytest.raises(NotSupported, match="empty"):
        goes_on(plain)
    expected = goes_on(own)
    torch.testing.assert_close(expected, model(ids, use_cache=False).logits[:, 12:], rtol=1e-4, atol=1e-4)
    for other in ("none", "ntk:factor=2", "leaky-rerope:window=4,factor=2"):
        apply(model, other)
        with pytest.raises(NotSupported, match="empty"):
            goes_on(again)
    apply(model, spec)
    third = filled(model)
    apply(model, "none")
    apply(model, spec)
    torch.testing.assert_close(goes_on(third), expected)


@pytest.mark.parametrize("spec", ["yarn:factor=2", "self-extend:group=2,window=4", "gist:id=90"])
@pytest.mark.parametrize("config", [True, False])
def test_an_emptied_cache_is_any_models(spec: str, config: bool) -> None:
    """And what the plain model then fills it with is the plain model's."""
    model, ids = dense.llama(layers=2), dense.tokens(1, 24)
    model(ids)
    cache = DynamicCache(config=model.config) if config else DynamicCache()

    def goes_on(part: Tensor) -> Tensor:
        return model(part, use_cache=True, **compat.with_cache(model, cache)).logits

    apply(model, spec)
    goes_on(ids)
    cache.reset()
    apply(model, "none")
    plain = torch.cat([goes_on(part) for part in ids.split(8, dim=1)], dim=1)
    torch.testing.assert_close(plain, model(ids).logits)
    apply(model, spec)
    with pytest.raises(NotSupported, match="empty"):
        goes_on(ids[:, :3])
