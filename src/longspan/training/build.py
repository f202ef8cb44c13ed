"""The model of a recipe: from scratch, from a trained one, or from a checkpoint."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

import longspan.lm  # noqa: F401 - makes transformers know the model type
from longspan import models
from longspan.apply import apply, config_entry
from longspan.core.facts import ModelFacts, facts_of, text_config
from longspan.core.method import Combination, NoMethod, parse
from longspan.core.training_setup import TrainingSetup
from longspan.hf.parts import add_parts
from longspan.models import load_tokenizer, rows_needed
from longspan.training.data import is_task
from longspan.training.recipe import LoraRecipe, Recipe, TokenizerRecipe
from longspan.util.errors import NotSupported, SpecError, nearest
from longspan.util.fetching import reading

_NOT_SETTINGS = ("model_type", "transformers_version", "architectures", "name_or_path", "_name_or_path")


def weights_dtype(dtype: str) -> torch.dtype:
    """The dtype of the weights: float32, also under mixed precision, except for `pure-bf16`."""
    return torch.bfloat16 if dtype == "pure-bf16" else torch.float32


def vocabulary(recipe: Recipe) -> int:
    """Embedding rows that the recipe's tokenizer needs; 0 where the model has its own tokenizer."""
    if isinstance(recipe.tokenizer, TokenizerRecipe):
        return recipe.tokenizer.vocabulary
    return rows_needed(load_tokenizer(recipe.tokenizer)) if recipe.tokenizer else 0


def model_config(recipe: Recipe, tokens: int, special: dict[str, int | None]) -> PreTrainedConfig:
    """The configuration of the model to train.

    From scratch, a vocabulary, window and special tokens that the recipe leaves out come from the tokenizer (`tokens`, `special`)
    and from data.length. Raises `LongspanError` for settings that the architecture does not have.
    """
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
    """A hint for a wrong name among too many to list: the similar ones, and where all are listed."""
    close = difflib.get_close_matches(word, sorted(known), n=5, cutoff=0.5)
    likely = " or ".join(f'"{name}"' for name in close)
    return (f"did you mean {likely}? " if close else "") + f"{lists} names them all"


def check_method(recipe: Recipe, facts: ModelFacts) -> Combination | None:
    """The recipe's method with its settings filled in; None where the recipe names none.

    facts: of the model to train. Raises `LongspanError` where the method cannot be trained so, and for positions that the model
    is not meant for.
    """
    pose = recipe.positions.pose(recipe.data.length)
    target = pose.target if pose else recipe.data.length
    method = parse(recipe.method).resolve(facts, target) if recipe.method else None
    if method is not None:
        _check_learnable(recipe, method, facts)
    reach = (method or Combination((NoMethod(),))).training_reach(facts)
    if reach is not None and reach < target:
        key = "positions.target" if pose else "data.length"
        raise SpecError(
            f"{key}={target}: {f'{method.spec} on ' if method else ''}this model reads {reach:,} tokens; "
            + (
                f"use method=yarn:factor={-(-target // facts.window)}"
                if facts.rope
                else f"set {key} to at most {reach}"
            )
        )
    return method


def _check_learnable(recipe: Recipe, method: Combination, facts: ModelFacts) -> None:
    """Raises `SpecError` where one of the methods cannot be learned with the recipe."""
    setup = training_setup(recipe)
    for part in method.methods:
        part.check_training(setup, facts)
    if setup.lora and (trained := method.parts(facts)):
        raise SpecError(f"lora: adapters do not train the parameters that {' and '.join(trained)} adds; leave lora out")


def training_setup(recipe: Recipe) -> TrainingSetup:
    """The recipe as methods see it."""
    keys = {"data.train": recipe.data.train, "data.valid": recipe.data.valid}
    return TrainingSetup(
        steps=recipe.training.steps,
        length=recipe.data.length,
        batch=recipe.training.at_once(int(os.environ.get("WORLD_SIZE", "1"))),
        packing=recipe.data.packing,
        positions=recipe.positions.kind,
        lora=recipe.lora is not None,
        from_scratch=not isinstance(recipe.model, str),
        texts={key: name for key, name in keys.items() if name is not None and not is_task(name)},
        task=recipe.data.task,
    )


def build(recipe: Recipe, config: PreTrainedConfig, method: Combination | None, dtype: torch.dtype) -> nn.Module:
    """The model before the first step, on the CPU, with its method and adapters on it."""
    if isinstance(recipe.model, str):
        model, _ = models.load(recipe.model, dtype=dtype, device="cpu")
    else:
        set_seed(recipe.seed)
        with reading(f"model: no {config.model_type} model can be built"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if method is not None:
        model = _with_method(model, method, recipe.seed)
    return model if recipe.lora is None else _adapted(model, recipe.lora)


def _with_method(model: PreTrainedModel, method: Combination, seed: int) -> PreTrainedModel:
    """The model with its methods: first those that build another model around it, then those that are put on it."""
    put_on = []
    for part in method.methods:
        if (built := part.build_model(model)) is None:
            put_on.append(part)
        else:
            model = built
            if (entry := config_entry("built_by", Combination((part,)))).get("files"):
                text_config(model.config).longspan = entry  # which file must be loaded first
    if not put_on:
        return model
    rest = Combination(tuple(put_on))
    rest.prepare_model(model)
    facts = facts_of(model)
    if rest.added_parameters(facts):
        set_seed(seed)
        add_parts(model, rest, facts)
    return apply(model, rest)


def saved_parameters(model: nn.Module) -> int:
    """Parameters that `save_pretrained` writes: all of a model, or the adapters alone where it has some."""
    if isinstance(model, PreTrainedModel):
        return sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in _peft().get_peft_model_state_dict(model).values())


def rebuild(recipe: Recipe, checkpoint: Path, method: Combination | None, dtype: torch.dtype) -> nn.Module:
    """The model as `checkpoint` holds it."""
    if recipe.lora is not None:
        assert isinstance(recipe.model, str)
        model, _ = models.load(recipe.model, dtype=dtype, device="cpu")
        return _peft().PeftModel.from_pretrained(
            model if method is None else apply(model, method), checkpoint, is_trainable=True
        )
    model, _ = models.load(checkpoint, dtype=dtype, device="cpu")
    if entry := models.saved_entry(checkpoint):  # load names only the methods that it has put on
        text_config(model.config).longspan = entry
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
            "lora needs the peft library: pip install 'longspan[train]'. Without lora all weights are trained"
        ) from error
    return peft


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns on activation checkpointing. Raises `NotSupported` for a model without it."""
    if not model.supports_gradient_checkpointing:
        raise NotSupported(
            f"training.gradient_checkpointing: {type(model).__name__} does not support it; set it to false"
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.20 or so
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
