"""Tiny tasks for the tests of `compare`; workers import this file, so it stands by itself.

The tasks get their names after they are made, so that they are not listed in the catalogue beside the real ones.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

import torch

from longspan.compare import compare
from longspan.tasks.base import Outcome, Sample, Task


def prefill(model, sample: Sample, meter):
    """The tokens of a sample, (1, T), and the model's output for them."""
    ids = torch.tensor([sample.tokens], device=model.device)
    with meter.prefill(tokens=ids.shape[1]):
        return ids, model(ids, use_cache=True)


@dataclass(frozen=True)
class TinyTask(Task):
    """Samples of random tokens, the same for every method."""

    title: ClassVar[str] = "Tiny"
    version: ClassVar[int] = 1
    measures: ClassVar[str] = "nothing of interest"
    source: ClassVar[str] = "made up"
    default_count: ClassVar[int] = 3

    def samples(self, tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(5, 260, (count, length), generator=generator).tolist()
        return [Sample(f"{seed}-{i}", row) for i, row in enumerate(rows)]


@dataclass(frozen=True)
class TinyLoss(TinyTask):
    """Mean loss of a window, with its loss by position; less is better."""

    higher_is_better: ClassVar[bool] = False

    def run(self, model, tokenizer, sample: Sample, meter) -> Outcome:
        ids, out = prefill(model, sample, meter)
        meter.cache(out.past_key_values)
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
        parts = torch.tensor_split(loss.double(), 64)
        return Outcome(
            score=float(loss.double().mean()),
            detail={
                "nll_by_position": [float(p.mean()) if len(p) else None for p in parts],
                "tokens_by_position": [len(p) for p in parts],
            },
        )


@dataclass(frozen=True)
class TinyHit(TinyTask):
    """Right where the likeliest next token is even; more is better. Decodes one token."""

    higher_is_better: ClassVar[bool] = True

    def run(self, model, tokenizer, sample: Sample, meter) -> Outcome:
        _, out = prefill(model, sample, meter)
        token = out.logits[:, -1:].argmax(-1)
        with meter.decode(tokens=1):
            model(token, past_key_values=out.past_key_values)
        return Outcome(score=float(token.item() % 2 == 0), detail={"token": token.item()})


@dataclass(frozen=True)
class TinyTrouble(TinyTask):
    """Everything that can go wrong in a worker, by `kind`; leaves its process id in the file `mark`."""

    higher_is_better: ClassVar[bool] = True
    kind: str = "none"
    mark: str = ""

    def run(self, model, tokenizer, sample: Sample, meter) -> Outcome:
        if self.mark:
            with open(self.mark, "a") as file:
                file.write(f"{os.getpid()}\n")
        if self.kind == "raise":
            raise ValueError("this cell is broken\nin two lines")
        if self.kind == "allocate":
            torch.empty(10**15)
        if self.kind == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "abort":
            os.abort()
        if self.kind == "exit":
            os._exit(3)
        if self.kind == "sleep":
            time.sleep(600)
        return Outcome(score=float("nan") if self.kind == "nan" else 1.0, detail={"odd": float("inf")})


@dataclass(frozen=True)
class TinyTooLong(TinyHit):
    """Draws samples that are longer than was asked for."""

    def samples(self, tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        return super().samples(tokenizer, length + 1, count, seed)


for _task in (TinyLoss, TinyHit, TinyTrouble, TinyTooLong):
    _task.name = _task.__name__.lower()  # type: ignore[misc]


def main(model: str, out: str, samples: str = "4") -> None:
    """What the tests start and kill: a small comparison with the bars off."""

    compare(model, methods=["ntk"], tasks=[TinyLoss(), TinyHit()], lengths=[256], out=out, samples=int(samples))
