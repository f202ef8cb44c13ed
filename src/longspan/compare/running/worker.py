"""One cell in one process: loads the model, applies the method, runs the samples.

A fresh process gives every cell its own memory peak and device context. It ends when its parent does, however that
happens; running out of memory is a result that it reports like any other; what libraries print goes to the cell's log.

Messages, in order: `("hello", cuda_is_broken)`, `("sample", done, of, tokens)` before the first and after each
sample, then `("done", result)`, `("out_of_memory", text)` or `("failed", text)`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from longspan.compare import statistics as stats
from longspan.compare.planning.cells import Cell, scale_of
from longspan.compare.storing import clean
from longspan.core.facts import text_config
from longspan.hf.site import current
from longspan.meter import Meter
from longspan.models import load
from longspan.plugins import load_from_environment
from longspan.tasks.base import Outcome, Sample
from longspan.util.errors import LongspanError
from longspan.util.failures import is_out_of_memory, one_line


@dataclass(frozen=True)
class Job:
    """The arguments of a worker: pickled cell, device, log path, environment variables.

    The cell is unpickled in the worker, since its classes may come from files that `environment` names.
    """

    cell: bytes
    device: str
    log: str
    environment: Mapping[str, str]


def run_job(job: Job, pipe: Connection) -> None:
    """Runs a worker process from start to end.

    Sends the messages of this module's docstring through `pipe`.
    """
    _end_with_parent()
    _prepare_process(job)
    try:
        pipe.send(("hello", cuda_is_broken(job.device)))
        load_from_environment()
        message: tuple[str, Any] = ("done", measure(pickle.loads(job.cell), job.device, pipe))
    except BaseException as error:
        traceback.print_exc()
        message = ("out_of_memory" if is_out_of_memory(error) else "failed", one_line(error))
    pipe.send(message)
    pipe.close()


def measure(cell: Cell, device: str, pipe: Connection) -> dict[str, Any]:
    """Runs a cell and returns score, interval, samples, cost and first prompt as JSON data.

    Raises `LongspanError` for samples that are wrong, or a method that is not on the loaded model.
    """
    start = time.perf_counter()
    torch.manual_seed(cell.seed)
    if cell.trained is None:
        model, tokenizer = load(cell.model, dtype=cell.dtype, device=device, method=cell.method)
        _check_method(model, cell)
    else:  # with the method that was saved on it, where there is one
        model, tokenizer = load(cell.trained, dtype=cell.dtype, device=device)
    load_s = time.perf_counter() - start
    samples = cell.task.samples(tokenizer, cell.length, cell.samples, cell.seed)
    check_samples(samples, cell)
    meter = Meter(model.device, model)
    pipe.send(("sample", 0, len(samples), 0))
    records = []
    with torch.no_grad():
        if model.device.type == "cuda":  # the first run of a shape loads kernels and sizes buffers: it is not timed
            cell.task.run(model, tokenizer, samples[0], Meter(model.device))
        for number, sample in enumerate(samples, start=1):
            records.append(sample_record(sample, cell.task.run(model, tokenizer, sample, meter)))
            pipe.send(("sample", number, len(samples), meter.tokens))
    scale = scale_of(cell.task, text_config(model.config).vocab_size)
    estimate = stats.score(records, scale, cell.length)
    return clean(
        {
            "score": estimate.value,
            "interval": estimate.interval,
            "n": estimate.n,
            "samples": records,
            "cost": {**meter.report(), "load_s": load_s, "wall_s": time.perf_counter() - start},
            "first_prompt": cell.task.describe_first(samples[0], tokenizer),
        }
    )


def sample_record(sample: Sample, outcome: Outcome) -> dict[str, Any]:
    """One sample's result as JSON data; a score that is not finite counts as failed."""
    score = clean(float(outcome.score))
    return {
        "id": sample.id,
        "score": score,
        "failed": bool(outcome.failed) or score is None,
        "detail": clean(outcome.detail),
    }


def check_samples(samples: list[Sample], cell: Cell) -> None:
    """Raises `LongspanError` where samples are missing, share an id, or are too long."""
    if not samples:
        raise LongspanError(f"{cell.task.spec} has no samples of {cell.length:,} tokens")
    if len({s.id for s in samples}) < len(samples):
        raise LongspanError(f"{cell.task.spec} drew two samples with one id")
    if (longest := max(len(s.tokens) for s in samples)) > cell.length:
        raise LongspanError(f"{cell.task.spec} drew a sample of {longest:,} tokens for a length of {cell.length:,}")


def _check_method(model: PreTrainedModel, cell: Cell) -> None:
    """Raises `LongspanError` unless the method on the model is the cell's."""
    present = current(model)
    if present is None or present.spec != cell.method.spec:
        found = present.spec if present else "nothing"
        raise LongspanError(f"{cell.method.spec} was to be measured, but {found} is on the model")


def _prepare_process(job: Job) -> None:
    """Leaves Ctrl-C to the parent, sends output to the log, and makes this process the kernel's first to end for memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(job.environment)
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()
    logging.disable_progress_bar()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _end_with_parent() -> None:
    """Ends this process as soon as its parent has ended, even by SIGKILL.

    The parent alone has the other end of a pipe, which the kernel then closes. The fork server is watched too.
    """
    parent, above = multiprocessing.parent_process(), os.getppid()
    assert parent is not None, "a worker is always a child process"

    def watch() -> None:
        while parent.is_alive() and os.getppid() == above:
            parent.join(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def cuda_is_broken(device: str) -> bool:
    """True where the fork server has initialised CUDA, which a forked process then cannot use."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return "forked subprocess" in str(error)
    return False
