"""The plan of a run: cells in order, a forecast of time, the manifest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from longspan import models
from longspan.compare.planning import cost, trained
from longspan.compare.planning.cells import Cell, scale_of
from longspan.compare.planning.lengths import START, choose_lengths
from longspan.compare.planning.requests import (
    Chosen,
    Request,
    read_lengths,
    read_methods,
    read_tasks,
    request_name,
)
from longspan.core.facts import ModelFacts
from longspan.core.method import Combination, NoMethod, catalogue
from longspan.tasks.base import Task
from longspan.util import environment


@dataclass(frozen=True)
class Plan:
    """A request, checked against the model and completed with the user's defaults.

    speed: floating point operations a second that the forecast assumes. machine: `environment.machine` of the device.
    """

    request: Request
    fingerprint: str
    facts: ModelFacts
    methods: list[Chosen]
    left_out: dict[str, str]
    tasks: list[Task]
    lengths: list[int]
    why: str
    """Why these lengths and numbers of samples."""
    counts: dict[str, int]
    """Samples of a cell, by task spec."""
    device: torch.device
    dtype: torch.dtype
    machine: dict[str, Any]
    speed: float

    @property
    def dtype_name(self) -> str:
        """The dtype's name, such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def cells(self) -> list[Cell]:
        """Every cell, the bare model's first, then short lengths before long.

        So the part of a stopped run can be read.
        """
        cells = [
            Cell(
                model=self.request.model,
                fingerprint=self.fingerprint if chosen.trained is None else models.fingerprint(chosen.trained),
                requested=chosen.requested,
                method=chosen.method,
                task=task,
                length=length,
                samples=self.counts[task.spec],
                seed=self.request.seed,
                dtype=self.dtype_name,
                device=self.device.type,
                processor=self.machine["device_name"],
                trained=chosen.trained,
                saved=chosen.saved,
            )
            for chosen in self.methods
            for task in self.tasks
            for length in self.lengths
        ]
        return sorted(cells, key=lambda c: (c.spec != NoMethod.name, c.length))

    def seconds(self, cell: Cell) -> float:
        """A rough forecast of a cell's time, in seconds."""
        return START + cell.samples * cost.prefill_flops(self.facts, cell.length) / self.speed

    def manifest(self) -> dict[str, Any]:
        """The run's `run.json` as JSON data: model, request, methods, tasks, lengths, machine and cells."""
        request = self.request
        return {
            "model": request.model,
            "fingerprint": self.fingerprint,
            "facts": dataclasses.asdict(self.facts),
            "card": cost.card(self.facts, self.dtype),
            "asked": {
                "methods": None if request.methods is None else [request_name(m) for m in request.methods],
                "tasks": None if request.tasks is None else [t.spec for t in self.tasks],
                "lengths": None if request.lengths is None else [str(x) for x in request.lengths],
                "samples": request.samples,
            },
            "methods": [self._method_facts(c) for c in self.methods],
            "left_out": self.left_out,
            "tasks": {t.spec: self._task_facts(t) for t in self.tasks},
            "lengths": self.lengths,
            "why": self.why,
            "native_length": self.facts.window,
            "seed": request.seed,
            "environment": {
                **self.machine,
                **environment.versions(),
                "dtype": self.dtype_name,
                "attention": f"{self.facts.attention}; methods with an attention of their own replace it",
                "command": environment.command_line(),
            },
            "cells": [c.describe() for c in self.cells()],
        }

    def _method_facts(self, chosen: Chosen) -> dict[str, Any]:
        return {
            "spec": chosen.spec,
            "asked": chosen.requested,
            **(_trained_facts(chosen) if chosen.trained else self._applied_facts(chosen.method)),
            **self._notes(chosen),
        }

    def _notes(self, chosen: Chosen) -> dict[str, Any]:
        """The sentences for the report that the row's methods bring along, as `notes`; no entry without any."""
        facts, methods = chosen.facts or self.facts, (*chosen.method.methods, *chosen.saved)
        notes = [note for method in methods for note in method.report_notes(facts, self.lengths[-1])]
        return {"notes": notes} if notes else {}

    def _applied_facts(self, method: Combination) -> dict[str, Any]:
        return {
            "title": " + ".join(m.title for m in method.methods),
            "reach": method.reach(self.facts),
            "exportable": method.exportable,
        }

    def _task_facts(self, task: Task) -> dict[str, Any]:
        scale = scale_of(task, self.facts.vocab)
        return {
            "spec": task.spec,
            "name": task.name,
            "title": task.title,
            "version": task.version,
            "measures": task.measures,
            "source": task.source,
            "metric": task.metric,
            "higher_is_better": scale.higher_is_better,
            "rates": task.rates,
            "worst": scale.worst,
            "samples": self.counts[task.spec],
        }


def _trained_facts(chosen: Chosen) -> dict[str, Any]:
    assert chosen.facts is not None
    methods = f" with {Combination(chosen.saved).spec}" if chosen.saved else ""
    return {
        "title": f"a model that was trained from this one, {chosen.facts.architecture}{methods}",
        "reach": chosen.facts.window,
        "exportable": True,
        "training": trained.training_cost(chosen.requested),
    }


def make_plan(request: Request) -> Plan:
    """Reads and checks a request.

    No weights are loaded. Raises `LongspanError` for whatever cannot be carried out.
    """
    request.check()
    facts = models.inspect_model(request.model)
    device = models.pick_device(request.device)
    dtype = models.pick_dtype(request.dtype, device)
    machine, speed = environment.machine(device), cost.speed(device, dtype)
    tasks = read_tasks(request.tasks)
    counts = {t.spec: request.samples or t.default_count for t in tasks}
    if request.lengths is None:
        number = 1 + len(catalogue() if request.methods is None else request.methods)
        keep, memory = request.samples is not None, machine["device_memory"]
        choice = choose_lengths(facts, number, list(counts.values()), dtype, memory, speed, keep)
        lengths, why = choice.lengths, f"chosen: {choice.why}"
        counts = {spec: min(n, choice.most_samples or n) for spec, n in counts.items()}
    else:
        lengths, why = read_lengths(request.lengths, facts), "as requested, with the native length"
    methods, left_out = read_methods(request.methods, facts, lengths[-1], request.model)
    return Plan(
        request=request,
        fingerprint=models.fingerprint(request.model),
        facts=facts,
        methods=methods,
        left_out=left_out,
        tasks=tasks,
        lengths=lengths,
        why=why,
        counts=counts,
        device=device,
        dtype=dtype,
        machine=machine,
        speed=speed,
    )
