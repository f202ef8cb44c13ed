"""transformers' Trainer with verified checkpoints, an exact validation loss, and metrics.

The loop, devices, mixed precision and optimiser are the Trainer's and accelerate's, so a recipe runs the same in one process and
under torchrun or `accelerate launch`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from longspan import meter
from longspan.training.loss import NextToken
from longspan.training.metrics import Journal, Live
from longspan.training.recipe import Recipe
from longspan.training.samples import collate
from longspan.util import environment
from longspan.util.errors import LongspanError, writing
from longspan.util.fetching import quiet
from longspan.util.files import write_atomically

CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"
"""The file that is written last into a checkpoint; a checkpoint without it is incomplete."""
RECIPE = "recipe.yaml"


def save_folder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: str | Path) -> None:
    """Saves weights (safetensors), configuration, tokenizer and recipe in `folder`."""
    with quiet(), writing(folder):
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        (Path(folder) / RECIPE).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")


def module_settings(model: nn.Module) -> list[tuple[nn.Parameter, dict[str, float]]]:
    """The parameters with optimiser settings (`lr`, `weight_decay`) of their module, and these settings.

    A module names them, by its parameters' names, in a method `optimizer_settings`.
    """
    found = []
    for module in model.modules():
        named: Any = getattr(module, "optimizer_settings", dict)
        found += [(getattr(module, name), settings) for name, settings in named().items()]
    return [(parameter, settings) for parameter, settings in found if parameter.requires_grad]


def group_by_settings(optimizer: torch.optim.Optimizer, chosen: list[tuple[nn.Parameter, dict[str, float]]]) -> None:
    """Moves these parameters of a new optimizer into groups, one for each combination of settings."""
    moved = {id(parameter) for parameter, _ in chosen}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    kinds: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    for parameter, settings in chosen:
        kinds.setdefault(tuple(sorted(settings.items())), []).append(parameter)
    for kind, parameters in kinds.items():
        optimizer.add_param_group({"params": parameters, **dict(kind)})


class RecipeTrainer(Trainer):
    """A Trainer for a `NextToken` module, which saves the model inside it."""

    def __init__(self, *, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, **rest: Any):
        super().__init__(data_collator=collate, **rest)
        self.recipe, self.tokenizer = recipe, tokenizer
        self.remove_callback(PrinterCallback)

    @property
    def next_token(self) -> NextToken:
        assert isinstance(self.model, NextToken)
        return self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model inside `NextToken` as a folder that loads; only the main process writes."""
        if self.args.should_save:
            save_folder(self.next_token.model, self.tokenizer, self.recipe, output_dir or self.args.output_dir or "")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with a separate group for parameters with separate settings."""
        optimizer = super().create_optimizer(model)
        group_by_settings(optimizer, module_settings(self.next_token if model is None else model))
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing: the model was built from the checkpoint."""

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss over all labels of the validation samples, independent of batches and devices."""
        self.next_token.eval()
        rows = []
        for batch in self.get_eval_dataloader(eval_dataset):
            out = self.next_token(**self._prepare_inputs(batch))
            rows.append(self.accelerator.gather_for_metrics(torch.stack((out["sums"].double(), out["counts"]), 1)))
        total, count = torch.cat(rows).sum(0).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Recorder(TrainerCallback):
    """Writes the Trainer's logs into the run's metrics and on the screen; times exclude validation and saving."""

    def __init__(
        self, journal: Journal, live: Live, *, read: Callable[[int, int], tuple[int, float]], peak: float | None
    ):
        """read(first, last): tokens without padding, and their operations, of steps first + 1 … last on all devices.
        peak: operations a second of all devices; None where unknown."""
        self.journal, self.live = journal, live
        self.read, self.peak = read, peak
        self._since, self._step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        meter.reset_peak(args.device)
        self._since, self._step = time.perf_counter(), state.global_step
        if state.is_world_process_zero:
            start = {"event": "start", "step": state.global_step, "devices": args.world_size, "time": time.time()}
            self.journal.write(
                {**start, **environment.versions(), "device": environment.machine(args.device)["device_name"]}
            )
            self.live.start(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = control.should_log or state.global_step >= state.max_steps
        self.live.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            record = self._measured(args, state, logs)
        elif "eval_loss" in logs:
            record = {"step": state.global_step, "valid_loss": logs["eval_loss"]}
        else:
            return
        if state.is_world_process_zero:
            self.journal.write(record)
            self.live.record(record)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise LongspanError(
                f"the loss at step {state.global_step} is {logs['loss']}: the training has diverged. Try a lower "
                "training.learning_rate, more training.warmup, or a lower training.clip"
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Marks the checkpoint as complete after every process has written its part."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            _sync(folder)
            sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()}
            mark = {"step": state.global_step, "devices": args.world_size, "files": sizes}
            write_atomically(folder / COMPLETE, json.dumps(mark) + "\n")
        self._since = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.live.stop()

    def _measured(self, args: TrainingArguments, state: TrainerState, logs: dict[str, float]) -> dict[str, Any]:
        """The record of the steps since the last one; the loss has been read from the device, so their work is done."""
        now, steps = time.perf_counter(), state.global_step - self._step
        seconds = now - self._since
        tokens, flops = self.read(self._step, state.global_step)
        self._since, self._step = now, state.global_step
        return {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": logs.get("learning_rate"),
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "mfu": None if self.peak is None else flops / seconds / self.peak,
            "peak_bytes": meter.read_peak(args.device),
            "left_s": (state.max_steps - state.global_step) * seconds / steps,
        }


def newest_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint of a run; None without one."""
    found = [p for p in (out / CHECKPOINTS).glob("checkpoint-*") if _is_whole(p)]
    return max(found, key=step_of, default=None)


def clear_broken(out: Path) -> None:
    """Removes incomplete checkpoints, left by a kill or a full disk."""
    for folder in (out / CHECKPOINTS).glob("checkpoint-*"):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint has its mark and its files have the sizes in it."""
    try:
        sizes = json.loads((folder / COMPLETE).read_text(encoding="utf-8")).get("files", {})
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 without one."""
    found = re.search(r"\d+$", folder.name)
    return int(found[0]) if found else -1


def _sync(folder: Path) -> None:
    """Flushes the files of a folder to the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
