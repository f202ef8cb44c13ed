"""Parameters, tokens, memory and time of a training, estimated from its recipe; neither data nor weights are read.

Memory is that of one device: weights, gradients, AdamW's two moments, and the activations kept for the backward pass. Time is
operations divided by the speeds that `longspan.plan` measures on the device. Both estimates are good to a factor of two.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedConfig

from longspan import models
from longspan.core.facts import ModelFacts, facts_of, text_config
from longspan.plan import available, measure
from longspan.training import build
from longspan.training.metrics import work
from longspan.training.recipe import Recipe
from longspan.training.run import check
from longspan.util import environment
from longspan.util.units import duration, size

_STATE_PASSES = 34
"""Bytes kept for the backward pass per token, layer and hidden channel in 16-bit numbers (Korthikanti 2022, 2205.05198)."""
_INNER_PASSES = 16
"""Those of `_STATE_PASSES` that lie inside a feed-forward network."""
_LOGITS = 3
"""Float32 copies of a chunk's logits: the logits, their softmax, their gradient."""
_OPS = 3 * 60
"""Small operations of a layer, forward and backward."""


@dataclass(frozen=True)
class TrainPlan:
    """Estimates of one training, in bytes of one device and seconds in all.

    micro_batch: sequences of one forward on a device. tokens: those of all samples, the padding of shorter documents included
    where samples are padded (`padded`), since padding takes its memory and time.
    """

    out: str
    parameters: int
    trained: int
    steps: int
    tokens_per_step: int
    tokens: int
    padded: bool
    micro_batch: int
    devices: int
    device: str
    dtype: str
    method: str | None
    flops: float
    weights: int
    gradients: int
    optimiser: int
    activations: int
    available: int
    seconds: float

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations

    @property
    def fits(self) -> bool:
        return self.memory <= self.available

    def to_dict(self) -> dict[str, Any]:
        return {"estimate": True, **asdict(self), "memory": self.memory, "fits": self.fits}


def plan_training(recipe: Recipe) -> TrainPlan:
    """Estimates of the recipe's training on this machine.

    Raises `LongspanError` for a recipe that cannot be trained.
    """
    check(recipe)
    device, devices = models.pick_device(), int(os.environ.get("WORLD_SIZE", "1"))
    dtype = recipe.training.number_format(device.type == "cuda")
    config = build.model_config(recipe, build.vocabulary(recipe), {})
    facts = facts_of(config)
    method = build.check_method(recipe, facts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    training, length = recipe.training, recipe.data.length
    parameters = facts.parameters + (method.added_parameters(facts) if method else 0)
    trained = parameters if recipe.lora is None else _adapters(model, recipe)
    load = work(model, length)
    products = load.products * (1 if recipe.lora is None else 4 / 6)
    tokens = training.steps * training.batch * length
    micro = training.at_once(devices)
    number = 2 if dtype == "pure-bf16" else 4
    return TrainPlan(
        out=recipe.out,
        parameters=parameters,
        trained=trained,
        steps=training.steps,
        tokens_per_step=training.batch * length,
        tokens=tokens,
        padded=recipe.data.packing == "none",
        micro_batch=micro,
        devices=devices,
        device=environment.machine(device)["device_name"],
        dtype=dtype,
        method=method.spec if method else None,
        flops=(products + load.attention) * tokens,
        weights=parameters * number,
        gradients=trained * number,
        optimiser=2 * trained * number,
        activations=_activations(recipe, facts, micro, dtype),
        available=available(device),
        seconds=_seconds(recipe, config, facts, device, dtype, (products, load.attention), micro) / devices,
    )


def _adapters(model: torch.nn.Module, recipe: Recipe) -> int:
    """Parameters of the adapters: rank × (inputs + outputs) for each adapted matrix."""
    assert recipe.lora is not None
    count = 0
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        adapted = leaf in recipe.lora.targets if recipe.lora.targets else leaf != "lm_head"
        if isinstance(module, torch.nn.Linear) and adapted:
            count += recipe.lora.rank * (module.in_features + module.out_features)
    return count


def _reversible(recipe: Recipe) -> bool:
    """Whether layers' inputs are recomputed from their outputs instead of kept."""
    return isinstance(recipe.model, dict) and bool(recipe.model.get("reversible"))


def _chunk(recipe: Recipe, tokens: int) -> int:
    """How many of `tokens` pass through a feed-forward network together."""
    chunk = recipe.model.get("mlp_chunk") if isinstance(recipe.model, dict) else None
    return min(tokens, chunk or tokens)


def _activations(recipe: Recipe, facts: ModelFacts, micro: int, dtype: str) -> int:
    """Bytes that `micro` sequences keep for the backward pass."""
    tokens = micro * recipe.data.length
    width, chunk = facts.hidden * (2 if dtype == "fp32" else 1), _chunk(recipe, tokens)
    inner = chunk * width * _INNER_PASSES
    layer = (
        tokens * width * (_STATE_PASSES - _INNER_PASSES)
    )  # without the feed-forward network, of which a chunk is kept
    states = tokens * facts.hidden * (4 if dtype == "fp32" else 2)
    if _reversible(recipe):
        layers = 2 * states + layer + inner
    elif recipe.training.gradient_checkpointing:
        layers = facts.layers * states + layer + inner
    else:
        layers = facts.layers * layer + inner * (1 if chunk < tokens else facts.layers)
    rows = min(tokens, recipe.training.loss_chunk or tokens)
    return layers + rows * facts.vocab * 4 * _LOGITS


def _seconds(
    recipe: Recipe,
    config: PreTrainedConfig,
    facts: ModelFacts,
    device: torch.device,
    dtype: str,
    work: tuple[float, float],
    micro: int,
) -> float:
    """Seconds of all steps on one device, with what the backward pass recomputes.

    work: operations per token of products and of attention.
    """
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    speeds = measure(device, kind, text_config(config))
    products, attention = work
    tokens = micro * recipe.data.length
    repeats = 1 + (2 / 9 if _chunk(recipe, tokens) < tokens else 0)  # two thirds of a layer's products are feed-forward
    if recipe.training.gradient_checkpointing or _reversible(recipe):
        repeats += 1 / 3
    tokens = recipe.training.batch * recipe.data.length
    calls = -(-recipe.training.batch // micro) * facts.layers * _OPS * speeds.operation
    passes = tokens * facts.layers * facts.hidden * _STATE_PASSES * 3 / speeds.copying
    step = tokens * repeats * (products / speeds.product + attention / speeds.attention) + max(calls, passes)
    return recipe.training.steps * step


def terminal(plan: TrainPlan, console: Console) -> None:
    """Prints the plan for people."""
    with_method = f" with {plan.method}" if plan.method else ""
    console.print(f"model    {plan.parameters:,} parameters{with_method}, {plan.trained:,} of them trained")
    padding = ", the padding of shorter documents included" if plan.padded else ""
    console.print(f"data     {plan.steps:,} steps of {plan.tokens_per_step:,} tokens: {plan.tokens:,} in all{padding}")
    console.print(
        f"memory   {size(plan.memory)} of {size(plan.available)} a device: weights {size(plan.weights)}, gradients "
        f"{size(plan.gradients)}, AdamW {size(plan.optimiser)}, activations {size(plan.activations)} "
        f"({plan.micro_batch} sequences at once)"
    )
    console.print(
        f"time     {duration(plan.seconds)} on {plan.devices} × {plan.device} in {plan.dtype} ({plan.flops / 1e15:,.3g} PFLOP)"
    )
    verdict = (
        "it fits"
        if plan.fits
        else "it does not fit: lower training.micro_batch, or training.gradient_checkpointing=true"
    )
    console.print(f"{verdict}. Memory and time are estimates; no data was read and no file written")
