"""Names that differ between the supported versions of transformers, in one place.

transformers 5.24 calls the KV cache `cache` in arguments and outputs; up to 5.23 it is `past_key_values`. A model's code may be
older than the installed version: the argument's name is taken from the signature of the forward that is called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import TransformersKwargs

from longspan.util.errors import NotSupported

NEW, OLD = "cache", "past_key_values"
CACHE = NEW if NEW in {field.name for field in fields(BaseModelOutputWithPast)} else OLD
"""The KV cache's name in outputs, and in the arguments of `generate`."""
CACHE_NAMES = [NEW, OLD]
"""What longspan models list as `keys_to_ignore_at_inference` and `_skip_keys_device_placement`."""
FORWARD = "longspan_forward"
"""The keyword argument that carries the record of a forward through a decoder (`longspan.hf.forward`)."""
_ALWAYS_KNOWN = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "shift_labels", "ignore_index", FORWARD}
"""Keyword arguments that transformers' models, losses and trainers pass along."""


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of a model's inputs: that of its weights, or the one where accelerate runs weights that are offloaded."""
    hook = getattr(model, "_hf_hook", None)
    for candidate in (hook, *(getattr(m, "_hf_hook", None) for m in model.modules())):
        for inner in getattr(candidate, "hooks", (candidate,)):
            if (device := getattr(inner, "execution_device", None)) is not None:
                return torch.device(device)
    return model.device


def parameters(forward: Callable[..., Any]) -> list[str]:
    """The names of a forward's arguments, in order."""
    return list(inspect.signature(forward).parameters)


def takes_keywords(forward: Callable[..., Any]) -> bool:
    """Whether a forward has `**kwargs`."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def cache_argument(module: nn.Module) -> str:
    """The name of the argument of `module`'s forward for the KV cache.

    Raises `NotSupported` where there is none.
    """
    return _cache_argument(type(module))  # type: ignore[arg-type]


@functools.cache
def _cache_argument(kind: type[nn.Module]) -> str:
    names = parameters(kind.forward)
    found = next((name for name in CACHE_NAMES if name in names), None)
    if found is None:
        raise NotSupported(
            f"{kind.__name__}.forward has no argument for a KV cache ({' or '.join(CACHE_NAMES)}); install a version of "
            "transformers that longspan's pyproject.toml names"
        )
    return found


def with_cache(module: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """The keyword argument of `module`'s forward for `cache`."""
    return {cache_argument(module): cache}


def cache_of(output: Any) -> Any:
    """The KV cache in a model's output, or None."""
    # The installed transformers' name first, and alone where it is there: the other one is deprecated where there are both.
    for name in (CACHE, *CACHE_NAMES):
        if hasattr(output, name):
            return getattr(output, name)
        if isinstance(output, dict) and name in output:
            return output[name]
    return None


def output_cache(cache: Any) -> dict[str, Any]:
    """The keyword argument that puts `cache` into an output."""
    return {CACHE: cache}


def given_cache(arguments: dict[str, Any]) -> Any:
    """The KV cache out of keyword arguments, under either name, which are removed.

    Raises `ValueError` where there are two.
    """
    old, new = arguments.pop(OLD, None), arguments.pop(NEW, None)
    return one_cache(new, old)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The KV cache under either of its names, or None.

    Raises `ValueError` where there are two.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("the KV cache was given twice, as cache= and as past_key_values=; pass one of them")
    return past_key_values if cache is None else cache


def peek_cache(arguments: dict[str, Any]) -> Any:
    """The KV cache among keyword arguments, under either name, or None."""
    return one_cache(arguments.get(NEW), arguments.get(OLD))


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any], *known: str) -> None:
    """Raises `TypeError` for keyword arguments that neither transformers' models nor `known` have."""
    unknown = sorted(set(kwargs) - _ALWAYS_KNOWN - set(known))
    if unknown:
        raise TypeError(f"{type(module).__name__} has no keyword arguments {', '.join(unknown)}; leave them out")
