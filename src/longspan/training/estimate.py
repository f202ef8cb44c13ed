"""Before a training: parameters, tokens, memory and time, counted from the recipe; no data is read and no weights load.

Memory is what one device holds: weights, gradients, AdamW's two moments, and the activations that wait for the backward pass.
Time is operations over the speeds that `longspan.plan` measures on the device. Both are estimates, good to a factor of two.
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
"""Bytes a token, layer and hidden channel that wait for the backward pass in 16-bit numbers (Korthikanti 2022, 2205.05198)."""
_INNER_PASSES = 16
"""Of these, what lies inside a feed-forward network."""
_LOGITS = 3
"""Float32 copies of a chunk's logits: themselves, their softmax, their gradient."""
_OPS = 3 * 60
"""Small operations of a layer forward and backward."""


@dataclass(frozen=True)
class TrainPlan:
    """Estimates, in bytes and seconds; `micro_batch` sequences pass through a device at once. `tokens` are all places of the
    samples; where these are documents that may be shorter (`padded`), padding is among them, and takes its memory and time."""

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
    """What the recipe will take here. Raises `LongspanError` for what cannot be."""
    check(recipe)
    device, devices = models.pick_device(), int(os.environ.get("WORLD_SIZE", "1"))
    dtype = recipe.training.number_format(device.type == "cuda")
    config = build.model_config(recipe, build.vocabulary(recipe), {})
    facts = facts_of(config)
    method = build.check_method(recipe, facts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted, length = recipe.training, recipe.data.length
    trained = facts.parameters if recipe.lora is None else _adapters(model, recipe)
    load = work(model, length)
    products = load.products * (1 if recipe.lora is None else 4 / 6)
    tokens = wanted.steps * wanted.batch * length
    micro = wanted.at_once(devices)
    number = 2 if dtype == "pure-bf16" else 4
    return TrainPlan(
        out=recipe.out,
        parameters=facts.parameters,
        trained=trained,
        steps=wanted.steps,
        tokens_per_step=wanted.batch * length,
        tokens=tokens,
        padded=recipe.data.packing == "none",
        micro_batch=micro,
        devices=devices,
        device=environment.machine(device)["device_name"],
        dtype=dtype,
        method=method.spec if method else None,
        flops=(products + load.attention) * tokens,
        weights=facts.parameters * number,
        gradients=trained * number,
        optimiser=2 * trained * number,
        activations=_activations(recipe, facts, micro, dtype),
        available=available(device),
        seconds=_seconds(recipe, config, facts, device, dtype, (products, load.attention), micro) / devices,
    )


def _adapters(model: torch.nn.Module, recipe: Recipe) -> int:
    """Parameters of the adapters: rank × (inputs + outputs) for each matrix that has one."""
    assert recipe.lora is not None
    found = 0
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        wanted = leaf in recipe.lora.targets if recipe.lora.targets else leaf != "lm_head"
        if isinstance(module, torch.nn.Linear) and wanted:
            found += recipe.lora.rank * (module.in_features + module.out_features)
    return found


def _reversible(recipe: Recipe) -> bool:
    """Whether layers' inputs are computed back instead of kept."""
    return isinstance(recipe.model, dict) and bool(recipe.model.get("reversible"))


def _chunk(recipe: Recipe, tokens: int) -> int:
    """How many tokens are inside a feed-forward network at once."""
    asked = recipe.model.get("mlp_chunk") if isinstance(recipe.model, dict) else None
    return min(tokens, asked or tokens)


def _activations(recipe: Recipe, facts: ModelFacts, micro: int, dtype: str) -> int:
    tokens = micro * recipe.data.length
    width, chunk = facts.hidden * (2 if dtype == "fp32" else 1), _chunk(recipe, tokens)
    inner = chunk * width * _INNER_PASSES
    layer = tokens * width * (_STATE_PASSES - _INNER_PASSES)  # without the inside, which in chunks is there once
    kept = tokens * facts.hidden * (4 if dtype == "fp32" else 2)
    if _reversible(recipe):
        layers = 2 * kept + layer + inner
    elif recipe.training.gradient_checkpointing:
        layers = facts.layers * kept + layer + inner
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
    """Of all steps on one device; what is made again in the backward pass counts here."""
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    speeds = measure(device, kind, text_config(config))
    products, attention = work
    tokens = micro * recipe.data.length
    again = 1 + (2 / 9 if _chunk(recipe, tokens) < tokens else 0)  # two thirds of a layer's products are a network's
    if recipe.training.gradient_checkpointing or _reversible(recipe):
        again += 1 / 3
    tokens = recipe.training.batch * recipe.data.length
    calls = -(-recipe.training.batch // micro) * facts.layers * _OPS * speeds.operation
    passes = tokens * facts.layers * facts.hidden * _STATE_PASSES * 3 / speeds.copying
    step = tokens * again * (products / speeds.product + attention / speeds.attention) + max(calls, passes)
    return recipe.training.steps * step


def terminal(made: TrainPlan, console: Console) -> None:
    """Prints the plan for people."""
    with_method = f" with {made.method}" if made.method else ""
    console.print(f"model    {made.parameters:,} parameters{with_method}, {made.trained:,} of them trained")
    padding = ", the padding of shorter documents included" if made.padded else ""
    console.print(f"data     {made.steps:,} steps of {made.tokens_per_step:,} tokens: {made.tokens:,} in all{padding}")
    console.print(
        f"memory   {size(made.memory)} of {size(made.available)} a device: weights {size(made.weights)}, gradients "
        f"{size(made.gradients)}, AdamW {size(made.optimiser)}, activations {size(made.activations)} "
        f"({made.micro_batch} sequences at once)"
    )
    console.print(
        f"time     {duration(made.seconds)} on {made.devices} × {made.device} in {made.dtype} ({made.flops / 1e15:,.3g} PFLOP)"
    )
    verdict = (
        "it fits"
        if made.fits
        else "it does not fit: lower training.micro_batch, or training.gradient_checkpointing=true"
    )
    console.print(f"{verdict}. Memory and time are estimates; nothing was read and nothing is written")
