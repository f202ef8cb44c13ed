"""`train`: carries out a recipe, from its first step to a model folder, or from the last checkpoint of a stopped run.

out/run.json           the training's identity: the recipe with every key, digests of data and weights, the method's settings.
                       Another training in the same folder is refused once steps have been trained
out/recipe.yaml        the recipe as YAML
out/tokenizer/         a tokenizer that was trained
out/tokens/            the data as token ids
out/checkpoints/       the last two checkpoints
out/metrics.jsonl      a record for every `log_every` steps
out/loss.png
out/model/             the result: weights, tokenizer, recipe
out/result.json        written last
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from longspan import models
from longspan.core.facts import facts_of, text_config
from longspan.core.method import Combination, parse
from longspan.models import load_tokenizer, rows_needed
from longspan.training import build
from longspan.training.data import (
    Tokens,
    check_source,
    documents,
    is_task,
    source,
    task_tokens,
    tokenise,
    train_tokenizer,
)
from longspan.training.loss import NextToken, causal_model
from longspan.training.metrics import METRICS, Journal, Live, peak_flops, plot, read_metrics, work
from longspan.training.proofs import prove_boundaries, prove_jump
from longspan.training.recipe import Recipe, TokenizerRecipe, differences, read_recipe
from longspan.training.samples import Course, Mixture, TextWindows, Validation, Windows, check_enough, labelled_share
from longspan.training.trainer import (
    CHECKPOINTS,
    RECIPE,
    RecipeTrainer,
    Recorder,
    clear_broken,
    newest_checkpoint,
    save_folder,
    step_of,
)
from longspan.util.errors import LongspanError, NotSupported, SpecError, writing
from longspan.util.files import filling, read_object, write_atomically
from longspan.util.units import duration, size

_RUN, _RESULT, _LOCK = "run.json", "result.json", ".lock"
_LOST = "it says which training is in the folder: restore it, or name another out"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""The system's errors where a disk is full, or a quota or a limit is reached."""
_LOOKED_AT = 64
"""Samples whose labels are counted for the estimate of a token's operations."""
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a training.

    tokens: without padding. parameters: those saved in the folder `model`, of adapters saved as such the adapters' alone. loss,
    valid_loss: the last measured means, in nats a token. seconds, tokens_per_s: without validation and saving, and the speed also
    without the first record after each start. resumed_from: a step; None for a run that was not resumed.
    """

    out: str
    model: str
    steps: int
    tokens: int
    parameters: int
    loss: float | None
    valid_loss: float | None
    seconds: float
    tokens_per_s: float | None
    mfu: float | None
    peak_bytes: int | None
    resumed_from: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    """What is known before the first step."""

    recipe: Recipe
    out: Path
    arguments: TrainingArguments
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    method: Combination | None
    tokens: Tokens
    valid: Tokens | None
    task: Tokens | None


def train(recipe: str | Path | Mapping[str, Any] | Recipe, **overrides: Any) -> TrainResult:
    """Carries out a training and returns its result; a stopped run resumes from its last checkpoint.

    recipe: a YAML file, a mapping of the same form, or a `Recipe`. overrides: keys that replace the recipe's, dotted ones written
    `**{"training.steps": 200}`.
    Raises `LongspanError` for a recipe that cannot be trained, where possible before anything is written.
    """
    read = read_recipe(recipe.to_dict() if isinstance(recipe, Recipe) else recipe, overrides.items())
    check(read)
    arguments, dtype = _arguments(read)
    out = Path(read.out).expanduser()
    main = arguments.process_index == 0
    with _owned(out) if main else contextlib.nullcontext(), _keeping(out, main):
        with arguments.main_process_first(local=False):
            if main:
                _open(out, read)
            if (done := _finished(out)) is not None:
                return done
            job = _prepare(read, out, arguments, dtype)
        return _carry_out(job)


def check(recipe: Recipe) -> None:
    """Raises `LongspanError` for a recipe that cannot be trained, as far as that is known without data and weights."""
    for key in ("data.train", "data.valid", "data.task"):
        check_source(recipe, key)
    build.check_method(recipe, facts_of(build.model_config(recipe, build.vocabulary(recipe), {})))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise NotSupported(
            "longspan train splits the data among devices and keeps the whole model on each; run it under torchrun, or under "
            "accelerate launch without FSDP and DeepSpeed"
        )


# Before the first step


def _arguments(recipe: Recipe) -> tuple[TrainingArguments, str]:
    """The Trainer's settings, and the dtype of the training."""
    settings, devices = recipe.training, int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    dtype = settings.number_format(cuda)
    micro = settings.at_once(devices)
    if settings.batch % (micro * devices):
        near = max(1, round(settings.batch / (micro * devices))) * micro * devices
        raise SpecError(
            f"training.batch={settings.batch} does not divide into micro-batches of {micro} on {devices} device"
            f"{'s' * (devices > 1)}; the nearest that does is training.batch={near}"
        )
    validates = recipe.data.valid is not None
    arguments = TrainingArguments(
        output_dir=str(Path(recipe.out).expanduser() / CHECKPOINTS),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=settings.batch // (micro * devices),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip or 0.0,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=dtype == "bf16",
        use_cpu=not cuda,
        seed=recipe.seed,
        train_sampling_strategy="sequential",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=2,
        eval_strategy="steps" if validates else "no",
        eval_steps=(settings.eval_every or 10 * settings.log_every) if validates else None,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would take DataParallel; several GPUs are for torchrun
    return arguments, dtype


@contextlib.contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Locks the run's folder for this process; the kernel releases the lock when the process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise LongspanError(f"{out} cannot be a run's folder: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise LongspanError(f"another training is writing to {out}; wait until it ends, or name another out") from None
    try:
        yield
    finally:
        os.close(lock)


def _open(out: Path, recipe: Recipe) -> None:
    """Writes the recipe into the run's folder, and removes the tokenizer of a training that never took a step.

    Raises `LongspanError` for a folder with another training or with other files.
    """
    now, before, trained = _as_json(recipe), _identity(out), _trained(out)
    if before is not None and trained:
        changed = differences({**before, "out": ""}, {**now, "out": ""})
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise SpecError(
                f"{out} holds a run of another recipe ({'; '.join(changed[:5])}{more}); use the old values to resume it, "
                "or another out for a new run"
            )
    elif before is None and trained:
        raise LongspanError(
            f"{out} has lost its {_RUN}, which says which recipe its {trained} belongs to; restore it, or name another out"
        )
    elif before is None and (others := [p.name for p in out.iterdir() if p.name != _LOCK]):
        raise LongspanError(f"{out} is not a run and is not empty (it has {min(others)}); name a new folder")
    else:
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        write_atomically(out / _RUN, json.dumps({"recipe": now}, indent=1) + "\n")
    write_atomically(out / RECIPE, yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON data, with keys as text."""
    return json.loads(json.dumps(recipe.to_dict(), default=str))


def _identity(out: Path) -> dict[str, Any] | None:
    """The recipe of the training in a folder; None without one."""
    if not (out / _RUN).is_file():
        return None
    stored = read_object(out / _RUN, _LOST)
    if "recipe" not in stored and "data.train" in stored:  # runs of earlier versions have it in a file of its own
        return _as_json(read_recipe(out / RECIPE))
    if not isinstance(stored.get("recipe"), dict):
        raise LongspanError(f"{out / _RUN} is damaged (it has no recipe); {_LOST}")
    return stored["recipe"]


def _trained(out: Path) -> str | None:
    """The name of a file or checkpoint in the folder that a training step wrote; None without one."""
    if (out / _RESULT).exists():
        return _RESULT
    if (out / "model").exists():
        return "model"
    if (checkpoint := newest_checkpoint(out)) is not None:
        return checkpoint.name
    return METRICS if any("loss" in r for r in read_metrics(out)) else None


def _prepare(recipe: Recipe, out: Path, arguments: TrainingArguments, dtype: str) -> _Job:
    tokenizer = _tokenizer(recipe, out)
    if recipe.method is not None:
        parse(recipe.method).prepare_tokenizer(tokenizer)
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    config = build.model_config(recipe, rows_needed(tokenizer), special)
    method = build.check_method(recipe, facts_of(config))
    method = method and method.prepare_tokenizer(tokenizer)
    show = arguments.process_index == 0
    tokens = _tokens(recipe, "data.train", tokenizer, out, show)
    valid = None if recipe.data.valid is None else _tokens(recipe, "data.valid", tokenizer, out, show)
    task = None if recipe.data.task is None else task_tokens(recipe, "data.task", tokenizer)
    read = {"data.train": tokens, "data.valid": valid, "data.task": task}
    _check_rows(config, method, {key: one for key, one in read.items() if one is not None})
    job = _Job(recipe, out, arguments, dtype, tokenizer, config, method, tokens, valid, task)
    _same_inputs(job)
    return job


def _check_rows(config: PreTrainedConfig, method: Combination | None, read: Mapping[str, Tokens]) -> None:
    """Raises `LongspanError` for tokens that the model has no embedding row for."""
    added = [id for part in (method.methods if method else ()) for id in part.token_ids()]
    rows = max([text_config(config).vocab_size, *(id + 1 for id in added)])
    for key, tokens in read.items():
        if len(tokens.ids) and (highest := int(tokens.ids.max())) >= rows:
            raise LongspanError(
                f"{key}: the tokenizer gives token {highest:,} and the model has {rows:,}: they do not belong together; copy the "
                "tokenizer from the model's source"
            )


def _tokens(recipe: Recipe, key: str, tokenizer: PreTrainedTokenizerBase, out: Path, show: bool) -> Tokens:
    name = source(recipe.data, key)
    if name is not None and is_task(name):
        return task_tokens(recipe, key, tokenizer)
    return tokenise(documents(recipe.data, key), tokenizer, out / "tokens", title=f"tokens of {key}", show=show)


def _tokenizer(recipe: Recipe, out: Path) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, trained where the recipe asks for it and the folder has none yet."""
    if isinstance(recipe.model, str):
        return load_tokenizer(recipe.model)
    if not isinstance(recipe.tokenizer, TokenizerRecipe):
        assert recipe.tokenizer is not None
        return load_tokenizer(recipe.tokenizer)
    place = out / "tokenizer"
    if not place.is_dir():
        texts = documents(recipe.data, "data.train")
        with filling(place) as folder:
            train_tokenizer(texts, recipe.tokenizer).save_pretrained(folder)
    return load_tokenizer(str(place))


def _same_inputs(job: _Job) -> None:
    """Stores digests of data and weights, or raises `LongspanError` where they differ from those that were stored."""
    now: dict[str, Any] = {
        "data.train": job.tokens.sha256,
        "data.valid": job.valid.sha256 if job.valid else None,
        "data.task": job.task.sha256 if job.task else None,
        "weights": models.fingerprint(job.recipe.model) if isinstance(job.recipe.model, str) else None,
        "method": job.method.spec if job.method else None,
    }
    place = job.out / _RUN
    before = read_object(place, _LOST)
    if not before.keys() & now.keys():
        write_atomically(place, json.dumps(before | now, indent=1) + "\n")
    elif changed := [key for key in now if now[key] != before.get(key)]:
        raise LongspanError(
            f"{job.out} was begun with other content of {', '.join(changed)}, which has changed under the same name since. "
            "Restore it to resume, or name another out for a new run"
        )


# The run


def _carry_out(job: _Job) -> TrainResult:
    if job.arguments.process_index == 0:
        clear_broken(job.out)
    checkpoint = newest_checkpoint(job.out)
    weights = build.weights_dtype(job.dtype)
    if checkpoint is None:
        model = build.build(job.recipe, job.config, job.method, weights)
    else:
        model = build.rebuild(job.recipe, checkpoint, job.method, weights)
    causal = causal_model(model)
    if job.recipe.training.gradient_checkpointing:
        build.checkpoint_activations(causal)
    _prove(job, model)
    live = Live(job.recipe.training.steps, show=job.arguments.process_index == 0)
    _announce(job, live, causal, checkpoint)
    trainer = _trainer(job, model, live)
    _check_space(job, model)
    if job.recipe.training.compile:
        causal.base_model.compile(dynamic=False)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        live.stop()
    assert isinstance(trainer.train_dataset, Course)
    return _finish(job, model, int(trainer.train_dataset.read(0, len(trainer.train_dataset)).sum()))


@contextlib.contextmanager
def _keeping(out: Path, main: bool) -> Iterator[None]:
    """On a full disk, removes an incomplete checkpoint and raises `LongspanError` that names the last complete one."""
    try:
        with writing(out):
            yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        if main:
            clear_broken(out)
        newest = newest_checkpoint(out)
        saved = f"{newest.name} is complete" if newest else "no checkpoint was written yet"
        raise LongspanError(
            f"{error.filename} cannot be written: {error.strerror}; {saved}. Make room, and the same command resumes from there"
        ) from error


def _check_space(job: _Job, model: nn.Module) -> None:
    """Raises `LongspanError` where the disk has no room for the checkpoints and the model."""
    lora, every = job.recipe.lora, job.recipe.training.save_every
    whole, trained = (
        sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not only)
        for only in (False, True)
    )
    checkpoint = (whole if lora is None else trained) + 2 * trained  # AdamW's two moments
    final = trained if lora and lora.save == "adapter" else whole
    kept = job.arguments.save_total_limit or 1
    old = sorted(map(step_of, (job.out / CHECKPOINTS).glob("checkpoint-*")))
    left = job.recipe.training.steps - (old[-1] if old else 0)
    saves = len(old) + (0 if every is None else -(-left // every))
    # an old checkpoint goes when the new one is there, and the model comes after the last
    needed = checkpoint * max(0, min(saves, kept) - len(old)) + max(final, checkpoint * (saves > max(kept, len(old))))
    if job.arguments.process_index == 0 and (free := shutil.disk_usage(job.out).free) < needed:
        alone = "" if every is None or free < final else "; with training.save_every=none the model alone is saved"
        raise LongspanError(
            f"{job.out} has {size(free)} free, and up to {size(needed)} are needed for checkpoints of {size(checkpoint)} and a "
            f"model of {size(final)}: make room, or name another out{alone}"
        )


def _prove(job: _Job, model: nn.Module) -> None:
    causal = causal_model(model)
    if job.recipe.positions.kind == "pose" and job.recipe.positions.skips:
        prove_jump(causal)
    if job.recipe.data.packing == "boundaries":
        prove_boundaries(causal)


def _announce(job: _Job, live: Live, causal: nn.Module, checkpoint: Path | None) -> None:
    devices, adapters = job.arguments.world_size, 0
    if job.recipe.lora is not None:  # all that trains then, and nothing else
        adapters = sum(p.numel() for p in causal.parameters() if p.requires_grad)
    count = f"{(sum(p.numel() for p in causal.parameters()) - adapters) / 1e6:,.1f} M parameters"
    count += f" and {adapters / 1e6:,.3g} M of adapters" if adapters else ""
    what = job.recipe.model if isinstance(job.recipe.model, str) else f"a new {job.config.model_type}"
    where = f"{devices} device{'s' * (devices > 1)} ({job.arguments.device.type}, {job.dtype})"
    live.say(f"{what}, {count}, {len(job.tokens.ids):,} tokens of text, on {where}")
    if devices == 1 and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        live.say(
            f"one of {torch.cuda.device_count()} GPUs is used; for all: torchrun --nproc-per-node=gpu -m longspan train …"
        )
    if checkpoint is not None:
        live.say(f"resuming from {checkpoint}")


def _trainer(job: _Job, model: nn.Module, live: Live) -> RecipeTrainer:
    recipe, data, steps = job.recipe, job.recipe.data, job.recipe.training
    pad = job.tokenizer.pad_token_id if job.tokenizer.pad_token_id is not None else job.tokenizer.eos_token_id
    pose = recipe.positions.pose(data.length)
    windows: Windows = TextWindows(job.tokens, data.length, data.packing, pad, pose, recipe.seed)
    if job.task is not None:
        task = TextWindows(job.task, data.length, "none", pad, pose, recipe.seed)
        windows = Mixture(windows, task, data.task_share)
    check_enough(windows, "data.train", data.length, len(job.tokens.ids))
    validation = None
    if job.valid is not None:
        ordinary = TextWindows(job.valid, data.length, data.packing, pad)
        check_enough(ordinary, "data.valid", data.length, len(job.valid.ids))
        validation = Validation(ordinary, data.valid_samples)
    peak = peak_flops(job.arguments.device, job.dtype)
    course = Course(windows, steps.steps * steps.batch, recipe.seed)
    recorder = Recorder(
        Journal(job.out),
        live,
        read=_reading(job, course, causal_model(model)),
        peak=peak and peak * job.arguments.world_size,
    )
    return RecipeTrainer(
        recipe=recipe,
        tokenizer=job.tokenizer,
        model=NextToken(model, steps.loss_chunk),
        args=job.arguments,
        train_dataset=course,
        eval_dataset=validation,
        callbacks=[recorder, *_callbacks(job.method, causal_model(model))],
    )


def _callbacks(method: Combination | None, causal: PreTrainedModel) -> list[TrainerCallback]:
    """The methods' callbacks for the training of the model."""
    return [callback for part in (method.methods if method else ()) for callback in part.training_callbacks(causal)]


def _reading(job: _Job, course: Course, causal: PreTrainedModel) -> Callable[[int, int], tuple[int, float]]:
    """A function of two steps: tokens without padding, and operations, of the steps after the first up to the second."""
    steps, length = job.recipe.training, job.recipe.data.length
    labelled = 1.0
    if steps.loss_chunk is not None:
        looked_at = min(_LOOKED_AT, len(course))
        labelled = labelled_share(course, looked_at) * length * looked_at / int(course.read(0, looked_at).sum())

    @functools.cache
    def per_token(tokens: int) -> float:
        return work(causal, tokens, labelled).total

    def read(first: int, last: int) -> tuple[int, float]:
        sizes, counts = np.unique(course.read(first * steps.batch, last * steps.batch), return_counts=True)
        total = math.fsum(n * size * per_token(size) for size, n in zip(sizes.tolist(), counts.tolist(), strict=True))
        return int(sizes @ counts), total

    return read


def _finish(job: _Job, model: nn.Module, tokens: int) -> TrainResult:
    """Saves the model and the result, in the main process; other processes wait for them."""
    if job.arguments.process_index == 0:
        lora = job.recipe.lora
        final = model.merge_and_unload() if lora and lora.save == "merged" else model  # type: ignore[operator]
        with filling(job.out / "model") as folder:
            save_folder(final, job.tokenizer, job.recipe, folder)
        records = read_metrics(job.out)
        plot(records, job.out / "loss.png", job.out.resolve().name)
        result = _result(job, records, build.saved_parameters(final), tokens)
        write_atomically(job.out / _RESULT, json.dumps(result.to_dict(), indent=1) + "\n")
    with job.arguments.main_process_first(local=False):
        done = _finished(job.out)
    assert done is not None, "the main process has written the result"
    return done


def _result(job: _Job, records: list[dict[str, Any]], parameters: int, tokens: int) -> TrainResult:
    def last(key: str) -> Any:
        return next((r[key] for r in reversed(records) if r.get(key) is not None), None)

    timed = [(before, r) for before, r in itertools.pairwise(records) if "seconds" in r]
    warm = [r for before, r in timed if before.get("event") != "start"]
    steps = job.recipe.training
    speeds = [r["tokens_per_s"] * r["seconds"] for r in warm]
    seconds = sum(r["seconds"] for r in warm)
    shares = [r["mfu"] * r["seconds"] for r in warm if r.get("mfu") is not None]
    starts = [r["step"] for r in records if r.get("event") == "start"]
    return TrainResult(
        out=str(job.out),
        model=str(job.out / "model"),
        steps=steps.steps,
        tokens=tokens,
        parameters=parameters,
        loss=last("loss"),
        valid_loss=last("valid_loss"),
        seconds=sum(r["seconds"] for _, r in timed),
        tokens_per_s=sum(speeds) / seconds if seconds else None,
        mfu=sum(shares) / seconds if shares else None,
        peak_bytes=last("peak_bytes"),
        resumed_from=starts[-1] or None if starts else None,
    )


def _finished(out: Path) -> TrainResult | None:
    """The result of a finished training, with the present paths, since folders are moved; None without its model."""
    place, model = out / _RESULT, out / "model"
    if not place.is_file() or not any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    again = "remove it, and the same command writes it again"
    stored = read_object(place, again)
    try:
        return TrainResult(**{**stored, "out": str(out), "model": str(model)})
    except TypeError as error:
        raise LongspanError(f"{place} is damaged ({error}); {again}") from error


def terminal(done: TrainResult, console: Console) -> None:
    """Prints the result for people."""
    known = {"loss": done.loss, "valid loss": done.valid_loss}
    losses = ", ".join(f"{name} {value:.4g}" for name, value in known.items() if value is not None)
    speed = f", {done.tokens_per_s:,.0f} tokens/s" if done.tokens_per_s else ""
    took = f"{done.tokens:,} tokens in {duration(done.seconds)}{speed}"
    console.print(f"{done.steps:,} steps, {took}: {losses or 'no loss is on record'}")
    console.print(f"the model is in {done.model}, its course in {done.out}/loss.png and {done.out}/metrics.jsonl")
