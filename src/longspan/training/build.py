"""The model that a recipe names: built from nothing, taken from somewhere to be tuned, or out of a checkpoint."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

import longspan.lm  # noqa: F401 - makes transformers know the model type
from longspan import models
from longspan.apply import apply
from longspan.core.facts import ModelFacts, text_config
from longspan.core.method import Combination, NoMethod, parse
from longspan.memory.gist import method as gist
from longspan.memory.landmark import method as landmark
from longspan.memory.rmt import RMT, around
from longspan.models import load_tokenizer, rows_needed
from longspan.training.recipe import LoraRecipe, Recipe, TokenizerRecipe
from longspan.util.errors import NotSupported, SpecError, nearest
from longspan.util.fetching import reading

_NOT_SETTINGS = ("model_type", "transformers_version", "architectures", "name_or_path", "_name_or_path")


def weights_dtype(dtype: str) -> torch.dtype:
    """What the weights are held in: float32, also under mixed precision, unless asked otherwise."""
    return torch.bfloat16 if dtype == "pure-bf16" else torch.float32


def vocabulary(recipe: Recipe) -> int:
    """The rows that the recipe's tokenizer needs or will need; 0 where the model brings its own."""
    if isinstance(recipe.tokenizer, TokenizerRecipe):
        return recipe.tokenizer.vocabulary
    return rows_needed(load_tokenizer(recipe.tokenizer)) if recipe.tokenizer else 0


def model_config(recipe: Recipe, tokens: int, special: dict[str, int | None]) -> PreTrainedConfig:
    """The configuration to train. From scratch, what the recipe leaves out of vocabulary, window and special tokens comes
    from the tokenizer and from data.length. Raises `LongspanError` for a configuration that cannot be."""
    if isinstance(recipe.model, str):
        return models.read_config(recipe.model)
    settings = dict(recipe.model)
    kind = settings.pop("type")
    default = _default_config(kind)
    known = (set(default.to_dict()) | set(default.attribute_map)) - set(_NOT_SETTINGS)
    for key in settings:
        if key not in known:
            lists = "longspan.lm.LongspanConfig" if kind == "longspan" else _DOCUMENTATION
            raise SpecError(f"model: a {kind} configuration has no key {key!r}; {_closest(key, known, lists)}")
    if settings.get("vocab_size", tokens) < tokens:
        raise SpecError(
            f"model.vocab_size={settings['vocab_size']}: the tokenizer's ids need {tokens} rows; leave it out"
        )
    filled = {"vocab_size": tokens, "max_position_embeddings": recipe.data.length, **special, **settings}
    with reading(f"model: no {kind} configuration can have these settings"):
        return AutoConfig.for_model(kind, **filled)


_DOCUMENTATION = "transformers' documentation"


def _default_config(kind: str) -> PreTrainedConfig:
    if kind not in CONFIG_MAPPING:
        hint = _closest(kind, CONFIG_MAPPING, _DOCUMENTATION)
        raise SpecError(f"model.type={kind}: transformers knows no such architecture; {hint}")
    return AutoConfig.for_model(kind)


def _closest(word: str, known: Any, lists: str) -> str:
    """A hint for a name among too many to be listed: those that are like it, and where all are."""
    close = difflib.get_close_matches(word, sorted(known), n=5, cutoff=0.5)
    likely = " or ".join(f'"{name}"' for name in close)
    return (f"did you mean {likely}? " if close else "") + f"{lists} names them all"


def check_method(recipe: Recipe, facts: ModelFacts) -> Combination | None:
    """The recipe's method with its settings filled in. Raises `LongspanError` where it cannot be, or where positions would be
    trained that the model is not made for."""
    pose = recipe.positions.pose(recipe.data.length)
    target = pose.target if pose else recipe.data.length
    wanted = parse(recipe.method).resolve(facts, target) if recipe.method else None
    if recipe.lora is not None and gist.gist_of(wanted) is not None:
        raise SpecError("lora: adapters do not train the gist token's own row; leave lora out")
    if (marks := landmark.landmark_of(wanted)) is not None:
        _check_landmarks(recipe, marks, facts)
    reach = _reach(wanted or Combination((NoMethod(),)), facts)
    if reach is not None and reach < target:
        key = "positions.target" if pose else "data.length"
        raise SpecError(
            f"{key}={target}: {f'{wanted.spec} on ' if wanted else ''}this model reads {reach:,} tokens; "
            + (
                f"use method=yarn:factor={-(-target // facts.window)}"
                if facts.rope
                else f"set {key} to at most {reach}"
            )
        )
    return wanted


def _check_landmarks(recipe: Recipe, method: landmark.Landmark, facts: ModelFacts) -> None:
    """Raises `SpecError` for what landmark attention is not trained with."""
    if recipe.lora is not None:
        raise SpecError("lora: adapters do not train the landmark's own row; leave lora out")
    if recipe.positions.kind != "ordinary":
        raise SpecError("positions.kind: landmark counts positions by itself; use positions.kind=ordinary")
    if recipe.data.packing == "boundaries":
        raise SpecError("data.packing=boundaries: landmark's blocks go through a whole sample; use plain or none")
    most = facts.window * method.block // (method.block + 1)
    if recipe.data.length > most:
        new = "set model.max_position_embeddings higher, or " if not isinstance(recipe.model, str) else ""
        raise SpecError(
            f"data.length={recipe.data.length}: with a landmark after every {method.block} tokens this model's window of "
            f"{facts.window:,} holds {most:,}; {new}train on shorter texts, it reads longer ones afterwards"
        )


def _reach(method: Combination, facts: ModelFacts) -> int | None:
    """The longest input that a model trained with `method` is for: what a scaling stretches the window to, even where it does
    not carry as far without training (NTK)."""
    reach = method.reach(facts)
    stretched = [int(facts.window * factor) for m in method.methods if (factor := getattr(m, "factor", None))]
    return None if reach is None else max([reach, *stretched])


def build(recipe: Recipe, config: PreTrainedConfig, method: Combination | None, dtype: torch.dtype) -> nn.Module:
    """The model before the first step, on the CPU, with its method and adapters on it."""
    if isinstance(recipe.model, str):
        model, _ = models.load(recipe.model, dtype=dtype, device="cpu")
    else:
        set_seed(recipe.seed)
        with reading(f"model: no {config.model_type} model can be built"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if method is not None:
        model = _with_method(model, method)
    return model if recipe.lora is None else _adapted(model, recipe.lora)


def _with_method(model: PreTrainedModel, method: Combination) -> PreTrainedModel:
    if isinstance(method.methods[0], RMT):
        return around(model, method.methods[0])
    method.prepare_model(model)
    return apply(model, method)


def saved_parameters(model: nn.Module) -> int:
    """How many parameters `save_pretrained` writes: the model's, or of a model with adapters these alone."""
    if isinstance(model, PreTrainedModel):
        return sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in _peft().get_peft_model_state_dict(model).values())


def rebuild(recipe: Recipe, checkpoint: Path, method: Combination | None, dtype: torch.dtype) -> nn.Module:
    """The model as it was when `checkpoint` was written."""
    if recipe.lora is not None:
        assert isinstance(recipe.model, str)
        model, _ = models.load(recipe.model, dtype=dtype, device="cpu")
        return _peft().PeftModel.from_pretrained(
            model if method is None else apply(model, method), checkpoint, is_trainable=True
        )
    model, _ = models.load(checkpoint, dtype=dtype, device="cpu")
    if method is not None and not isinstance(
        method.methods[0], RMT
    ):  # scaling is in the configuration, and load put on the rest
        text_config(model.config).longspan = {"method": method.spec}
    return model


def _adapted(model: PreTrainedModel, lora: LoraRecipe) -> nn.Module:
    peft = _peft()
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in lora.targets:
        if name not in linear:
            raise SpecError(
                f"lora.targets: {type(model).__name__} has no linear layer {name!r}; {nearest(name, linear)}"
            )
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, settings)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise NotSupported(
            "lora needs the peft library: pip install 'longspan[train]'. Without lora the model is trained whole"
        ) from error
    return peft


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keeps only what each layer reads, and makes the rest again in the backward pass."""
    if not model.supports_gradient_checkpointing:
        raise NotSupported(
            f"training.gradient_checkpointing: {type(model).__name__} does not know it; use training.gradient_checkpointing=false"
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20 or so
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
