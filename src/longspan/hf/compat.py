"""Names that differ between the supported versions of transformers, in one place.

transformers 5.24 calls the KV cache `cache` in arguments and outputs; up to 5.23 it is `past_key_values`. A model's own code
may lag behind the installed version, so the argument's name is read off the signature of the very forward that is called.
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
"""What models of ours list as `keys_to_ignore_at_inference` and `_skip_keys_device_placement`."""
FORWARD = "longspan_forward"
"""The keyword under which the record of one forward travels through a decoder (`longspan.hf.forward`)."""
_ALWAYS_KNOWN = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "shift_labels", "ignore_index", FORWARD}
"""Keyword arguments that transformers' models, losses and trainers pass along."""


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its input: the device of its weights, or that on which accelerate runs weights kept elsewhere."""
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
    """Whether a forward takes keyword arguments that its signature does not name."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def cache_argument(module: nn.Module) -> str:
    """The name of the argument by which `module` takes a KV cache. Raises `NotSupported` where there is none."""
    return _cache_argument(type(module))  # type: ignore[arg-type]


@functools.cache
def _cache_argument(kind: type[nn.Module]) -> str:
    names = parameters(kind.forward)
    found = next((name for name in CACHE_NAMES if name in names), None)
    if found is None:
        raise NotSupported(
            f"{kind.__name__} takes no KV cache by the names that are known ({' or '.join(CACHE_NAMES)}); longspan supports the "
            "transformers versions that its pyproject.toml names"
        )
    return found


def with_cache(module: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """The keyword argument that hands `cache` to `module`."""
    return {cache_argument(module): cache}


def cache_of(output: Any) -> Any:
    """The KV cache of a model's output, or None."""
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
    """Takes the KV cache out of keyword arguments, by whichever name. Raises `ValueError` where both names are given."""
    old, new = arguments.pop(OLD, None), arguments.pop(NEW, None)
    return one_cache(new, old)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The KV cache that was given by either of its names, or None. Raises `ValueError` where both are given."""
    if cache is not None and past_key_values is not None:
        raise ValueError("the KV cache was given twice, as cache= and as past_key_values=; give it once")
    return past_key_values if cache is None else cache


def peek_cache(arguments: dict[str, Any]) -> Any:
    """The KV cache among keyword arguments, by whichever name, or None."""
    return one_cache(arguments.get(NEW), arguments.get(OLD))


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any], *known: str) -> None:
    """Raises `TypeError` for keyword arguments that neither transformers' models nor `known` have, so that none is swallowed."""
    unknown = sorted(set(kwargs) - _ALWAYS_KNOWN - set(known))
    if unknown:
        raise TypeError(
            f"{type(module).__name__} does not know the keyword arguments {', '.join(unknown)}, which would change nothing; "
            "leave them out"
        )
