"""Modules of trained parameters that methods add to a model (`Method.parts`): put there, saved with it, and read back.

They lie in `model.longspan_parts`, by the method's name, so that transformers trains and saves them as it does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from longspan.core.facts import ModelFacts
from longspan.core.method import Combination
from longspan.util.errors import NotSupported

PARTS = "longspan_parts"


def add_parts(model: PreTrainedModel, methods: Combination, facts: ModelFacts) -> None:
    """Adds the modules of the methods that have some, with their initial values, in the model's dtype and on its device.

    methods: with every setting filled in. Modules that the model has already stay as they are.
    """
    for name, module in methods.parts(facts).items():
        if name not in parts_of(model):
            _register(model, name, module)


def load_parts(model: PreTrainedModel, methods: Combination, facts: ModelFacts, files: Iterable[Path]) -> None:
    """Adds the modules of the methods whose parameters are in the safetensors `files`, with these as their values.

    Raises `NotSupported` where the parameters are those of other settings.
    """
    weights = _read(files)
    for name, module in methods.parts(facts).items():
        saved = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
        if saved:
            _fill(module, saved, f"{methods.spec}: the saved parameters of {name}")
            _register(model, name, module)


def parts_of(model: PreTrainedModel) -> Mapping[str, nn.Module]:
    """The added modules by the name of their method; none where no method added any."""
    return getattr(model, PARTS, {})


def is_part(name: str) -> bool:
    """True for the name of a parameter, in a saved model, that belongs to an added module."""
    return name.startswith(f"{PARTS}.")


def _register(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    if not hasattr(model, PARTS):
        model.add_module(PARTS, nn.ModuleDict())
    parts: nn.ModuleDict = getattr(model, PARTS)
    parts[name] = module.to(model.device, model.dtype).train(model.training)


def _read(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of added modules, by their names within `longspan_parts`."""
    found = dict[str, Tensor]()
    for file in files:
        with safe_open(file, "pt") as weights:
            names = filter(is_part, list(weights.keys()))
            found |= {name.removeprefix(f"{PARTS}."): weights.get_tensor(name) for name in names}
    return found


@torch.no_grad()
def _fill(module: nn.Module, saved: dict[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict(saved)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise NotSupported(
            f"{what} do not fit it; load it with the settings that it was trained with ({reason})"
        ) from error
