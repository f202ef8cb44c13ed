"""Applies methods to a model, after a trial on a short input; `longspan.hf.site.remove` takes them off again.

A method attaches through `longspan.hf.site.Site`. The trials (`longspan.hf.trial`) refuse an architecture whose rotation, KV
cache or attention the method does not know.

    apply(model, "yarn:factor=4")
    with applied(model, "streaming:window=2044"):
        model.generate(...)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from longspan.core.facts import facts_of, rotary_modules, text_config
from longspan.core.method import Combination, Method, combination
from longspan.hf import compat
from longspan.hf.rotary import angles
from longspan.hf.site import SITE, Site, current, remove
from longspan.hf.trial import (
    ANOTHER_MODEL,
    SHORT,
    STILL_WORK,
    TOLERANCE,
    check_unchanged,
    counted,
    evaluating,
    is_wide,
    probe,
    probe_in_pieces,
    prove_attention,
    reads_in_pieces,
    relative_error,
    short_input,
    tolerance_of,
    tried,
)
from longspan.util.errors import LongspanError, NotSupported

Model = TypeVar("Model", bound=PreTrainedModel)


def apply(
    model: Model,
    method: str | Method | Combination | Iterable[str | Method],
    *,
    length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Model:
    """Applies `method` to `model` in place, in the place of methods applied before, and returns the model.

    method: a spec string, a method, or several that are combined. length: the target length in tokens, from which settings that
    were left out follow. tokenizer: where the method needs a special token (gist, landmark), it gets that token, and the model a
    row for it. Raises `SpecError` for a method that cannot be parsed and `NotSupported` for one that cannot work on this model,
    which is then as before.
    """
    methods = combination(method)
    previous = current(model)
    remove(model)
    try:
        facts = facts_of(model)
        resolved = methods.resolve(facts, length)
        if tokenizer is not None:
            resolved = resolved.prepare_tokenizer(tokenizer)
            resolved.prepare_model(model)
            facts = facts_of(model)
        site = Site(model, resolved, facts)
        site.makes_dynamic_caches = facts.encoder_decoder or not site.slots or _makes_dynamic_caches(model)
        _attach(site)
    except BaseException:
        if previous is not None:
            apply(model, previous)
        raise
    object.__setattr__(site.decoder, SITE, site)
    # An encoder's model has one configuration, of which `text_config` gives a copy.
    config = model.config if site.facts.encoder_decoder else text_config(model.config)
    before = getattr(config, "longspan", None)  # a checkpoint may have been saved with a method in it
    config.longspan = config_entry("method", site.methods)
    site.keep_for_undo(partial(setattr, config, "longspan", before) if before else partial(delattr, config, "longspan"))
    return model


def config_entry(key: str, methods: Combination) -> dict[str, Any]:
    """What a configuration says of its methods: the spec under `key`, and under `files` the users' files that define them."""
    return {key: methods.spec} | ({"files": methods.sources} if methods.sources else {})


@contextlib.contextmanager
def applied(
    model: Model, method: str | Method | Combination | Iterable[str | Method], *, length: int | None = None
) -> Iterator[Model]:
    """A context in which `method` is applied to `model`, which is then as before; arguments and errors are those of `apply`."""
    previous = current(model)
    apply(model, method, length=length)
    try:
        yield model
    finally:
        remove(model)
        if previous is not None:
            apply(model, previous)


def _attach(site: Site) -> None:
    """Attaches all methods, each after its trial: first those of frequencies, then of attention, then of queries."""
    try:
        for method in sorted(site.methods.methods, key=lambda m: ("queries" in m.slots, "attention" in m.slots)):
            if site.facts.encoder_decoder and method.slots:
                _attach_to_encoder_decoder(site, method)
            elif method.slots & {"attention", "queries"}:
                _attach_attention(site, method)
            elif "frequencies" in method.slots:
                _attach_frequencies(site, method)
            else:
                method.attach(site)
        if site.slots and not site.facts.encoder_decoder:
            site.open()
    except BaseException:
        site.undo()
        raise


def _attach_attention(site: Site, method: Method) -> None:
    """Attaches a method of attention after a trial on a short input.

    Raises `NotSupported` where the trial fails.

    Every layer must call the method's attention, logits must stay where the method changes nothing, and a KV cache must
    continue a text. For a method that changes every input, plain attention in its place is compared first.
    """
    if not site.facts.attention_interface:
        raise NotSupported(
            f"{method.name} needs a model that calls its attention through transformers' AttentionInterface; "
            f"{site.facts.architecture} does not. "
            + ("Methods that only change frequencies work: ntk, yarn" if site.facts.rope else ANOTHER_MODEL)
        )
    built_with = next((p for m in site.model.modules() if hasattr(p := getattr(m, "pattern", None), "mask")), None)
    if "attention" in method.slots and built_with is not None:
        raise NotSupported(
            f"{method.name} changes which keys are seen, and this model was built with the pattern {built_with.spec}; build it "
            "with attention=full, or with the other pattern"
        )
    try:
        neutral = method.neutral_length()
        length = min(SHORT, neutral) or SHORT
        if not neutral and site.attend is None:  # or another method's attention would be compared with plain attention
            prove_attention(site)
        before = probe(site.model, length)
        tolerance = tolerance_of(site, before) if neutral else 0.0
        caches = reads_in_pieces(site.model, before)
        method.attach(site)
        after = tried(site, length)
        with counted(site) as called:
            probe(site.model, length)
        pieces = probe_in_pieces(site.model, length) if caches else None
    except LongspanError:
        raise
    except Exception as error:
        raise NotSupported(
            f"{method.name} does not run on {site.facts.architecture}: {type(error).__name__}: {error}. {STILL_WORK}"
        ) from error
    if len(called) != site.facts.layers:
        raise NotSupported(
            f"{method.name} replaces the attention of every layer, and {site.facts.architecture} called it in {len(called)} of "
            f"{site.facts.layers} layers. {STILL_WORK}"
        )
    if neutral:
        check_unchanged(site, before, after, tolerance)
    if pieces is not None and not relative_error(after, pieces) < max(tolerance, TOLERANCE[is_wide(after.dtype)]):
        raise NotSupported(
            f"{site.methods.spec} gives other logits for a short input whose second half is read from a KV cache (relative error "
            f"{relative_error(after, pieces):.1e}): {site.facts.architecture} uses its cache in a way that the method does not "
            "know. " + STILL_WORK
        )


def _attach_frequencies(site: Site, method: Method) -> None:
    """Attaches a method of frequencies.

    Raises `NotSupported` where other angles do not change the logits of distant tokens.

    That is so where a model has a rotary module and does not call it.
    """
    try:
        positions = torch.linspace(0, site.facts.window - 1, min(SHORT, site.facts.window)).long()[None]
        old = [(module, angles(module, positions)) for _, module in rotary_modules(site.model)]
        before = probe(site.model, positions.shape[1], positions)
        method.attach(site)
        new = [angles(module, positions) for _, module in rotary_modules(site.model)]
        after = probe(site.model, positions.shape[1], positions)
        # Twice past the trained window: some versions of transformers choose other frequencies there, and fail the second time.
        past = positions + text_config(site.model.config).max_position_embeddings
        for _ in range(2):
            probe(site.model, positions.shape[1], past)
    except LongspanError:
        raise
    except Exception as error:
        raise NotSupported(
            f"{method.spec} does not run on {site.facts.architecture}: {type(error).__name__}: {error}. {ANOTHER_MODEL}"
        ) from error
    others = any(not torch.equal(a, b) for (_, a), b in zip(old, new, strict=True))
    if others and torch.equal(before, after):
        raise NotSupported(
            f"{method.spec} changes nothing: {site.facts.architecture} has a rotary module and does not use it in its attention. "
            + ANOTHER_MODEL
        )


def _attach_to_encoder_decoder(site: Site, method: Method) -> None:
    """Attaches a method to an encoder-decoder.

    Raises `NotSupported` where it changes logits that it must not change.
    """
    length = min(SHORT, method.neutral_length())
    try:
        before = probe(site.model, length)
        method.attach(site)
        after = probe(site.model, length)
    except LongspanError:
        raise
    except Exception as error:
        raise NotSupported(
            f"{method.name} does not run on {site.facts.architecture}: {type(error).__name__}: {error}"
        ) from error
    check_unchanged(site, before, after, TOLERANCE[is_wide(before.dtype)])


@torch.no_grad()
def _makes_dynamic_caches(model: PreTrainedModel) -> bool:
    """Whether the cache that the model makes by itself is a `DynamicCache`."""
    with evaluating(model):
        try:
            cache = compat.cache_of(model(input_ids=short_input(model, 1), use_cache=True))
        except Exception:  # the method's own trial reports it
            return True
    return cache is None or type(cache) is DynamicCache
