"""Parameters that ask for settings of their own in the optimizer get them, in a run as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_tiny import folder, recipe

from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.training.run import train
from longspan.training.trainer import RecipeTrainer, group_by_settings, module_settings

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OWN = {"log_step", "log_decay", "turn", "entry", "low"}


def names_by_rate(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[float, float], set[str]]:
    found: dict[tuple[float, float], set[str]] = {}
    names = {id(p): n.rpartition(".")[2] for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        found.setdefault((group.get("initial_lr", group["lr"]), group["weight_decay"]), set()).update(
            names[id(p)] for p in group["params"]
        )
    return {rates: found[rates] for rates in found if found[rates]}


def test_state_spaces_learn_at_their_own_rate() -> None:
    model = LongspanForCausalLM(
        LongspanConfig(**SIZES, position="nope", attention=["s4:states=4", "s4:states=4,lr=none"])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    group_by_settings(optimizer, module_settings(model))
    found = names_by_rate(model, optimizer)
    assert found[(0.001, 0.0)] == found[(0.02, 0.0)] == OWN
    assert found[(0.02, 0.1)] == {"weight", "bias", "exit", "direct"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_a_run_gives_them_their_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    made = RecipeTrainer.create_optimizer

    def watch(self: RecipeTrainer, model: Any = None) -> torch.optim.Optimizer:
        optimizer = made(self, model)
        seen.append(names_by_rate(self.next_token, optimizer))
        return optimizer

    monkeypatch.setattr(RecipeTrainer, "create_optimizer", watch)
    model = {"type": "longspan", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model.update(position="nope", attention="s4:states=4")
    have = folder(tmp_path / "text")
    done = train(recipe(have, tmp_path / "run", model=model, training={"steps": 3, "weight_decay": 0.1}))
    assert done.steps == 3
    assert seen[0][(0.001, 0.0)] == OWN
    assert (0.003, 0.1) in seen[0]
