"""Saves a model with a method on it as a folder that plain transformers and vLLM load.

A checkpoint holds a method wholly where it is a static scaling of rotary frequencies (a few entries of config.json) or a change
of weights. Scalings are written for each reader: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling`
(transformers 4), and lengths and magnitudes as vLLM reads them.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from longspan import models
from longspan.core.facts import ModelFacts, rope_parameters, text_config
from longspan.core.method import Combination, Method, NoMethod, catalogue, combination
from longspan.export.encoders import converts_encoders, export_encoder
from longspan.export.folder import (
    ExportReport,
    copy_tokenizer,
    filling,
    free_place,
    read_json,
    size_of,
    write_json,
)
from longspan.util.errors import LongspanError, NotSupported
from longspan.util.fetching import quiet

_NO_REASON = "it works while the model runs, and a checkpoint only holds weights and settings"
# vLLM multiplies max_position_embeddings by `factor` for these types, but not on a Gemma 3.
_SCALED_BY_VLLM = ("linear", "dynamic")
# Their configurations refuse any complete `rope_scaling` in transformers 4.
_STRICT_IN_4 = ("olmo", "olmo2", "olmo3", "phi3", "hunyuan_v1_dense", "hunyuan_v1_moe")


def export(
    model_name: str | Path,
    method: str | Method | Combination,
    out: str | Path,
    *,
    length: int | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Saves `model_name` with `method` on it in the folder `out`.

    length: the target length in tokens, from which settings that were left out follow. dtype: that of the saved weights;
    the model's own if left out. overwrite: replace a model that is in `out`.
    A method with an `encoder_form` converts a trained encoder instead (`longer_encoder`).
    Raises `NotSupported` for a method that a checkpoint cannot hold, with its reason, before any weights load.
    """
    if converts_encoders(combination(method)):
        return export_encoder(model_name, method, out, length=length, dtype=dtype, overwrite=overwrite)
    place = free_place(Path(out), overwrite, models.local_folder(model_name))
    facts = models.inspect_model(model_name)
    methods = combination(method).resolve(facts, length)
    if not methods.exportable:
        raise NotSupported(_why_not(methods, facts, model_name))
    reach = methods.reach(facts)
    if length is not None and reach is not None and reach < length:
        raise NotSupported(
            f"{methods.spec} on {model_name} reads {reach:,} tokens, fewer than the length of {length:,}; leave its factor out, "
            "so that it follows from the length, or use a method that reads further, such as yarn"
        )
    source = models.ready_folder(model_name)
    model, _ = models.load(model_name, dtype=dtype or _own_dtype(source), device="cpu", method=methods)
    with filling(place) as folder:
        notes = _save(model, facts, source, folder)
        size = size_of(folder)
    config = text_config(model.config)
    return ExportReport(
        folder=str(out),
        model=str(model_name),
        method=methods.spec,
        dtype=str(model.dtype).removeprefix("torch."),
        bytes=size,
        window=config.max_position_embeddings,
        reach=reach or config.max_position_embeddings,
        max_position_embeddings=_section(read_json(place / "config.json"))["max_position_embeddings"],
        rope_parameters=getattr(config, "rope_parameters", None),
        notes=tuple(notes),
    )


def _why_not(methods: Combination, facts: ModelFacts, name: str | Path) -> str:
    """Why a checkpoint cannot hold the methods, and the nearest methods that it can hold."""
    reasons = "; ".join(f"{m.name}: {m.why_not_exportable or _NO_REASON}" for m in methods.methods if not m.exportable)
    rest = " + ".join(m.spec for m in methods.methods if m.exportable)
    others = [n for n, cls in catalogue().items() if cls.exportable and cls is not NoMethod and _fits(cls, facts)]
    nearest = f'export "{rest}" and put the rest on after loading' if rest else f"export one of {', '.join(others)}"
    if not rest and not others:
        nearest = "export none"
    return (
        f"{methods.spec} cannot be saved for plain transformers ({reasons}). Nearest: {nearest}, or keep the method beside "
        f'the model: longspan.load("{name}", method="{methods.spec}")'
    )


def _fits(cls: type[Method], facts: ModelFacts) -> bool:
    """Whether the model can take the method with its default settings."""
    try:
        cls().check(facts)
    except (LongspanError, TypeError):  # TypeError: a setting has no default
        return False
    return True


# The folder


def _save(model: PreTrainedModel, facts: ModelFacts, source: Path, folder: Path) -> list[str]:
    """Writes weights, tokenizer and configuration; returns notes for the user."""
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(folder).free
    if free < needed:
        raise LongspanError(f"{folder.parent} has {free / 1e9:.1f} GB free and the model needs {needed / 1e9:.1f} GB")
    with quiet():
        model.save_pretrained(folder)
    copy_tokenizer(source, folder, text_config(model.config).max_position_embeddings)
    written = read_json(folder / "config.json")
    notes = _complete(written, model.config, facts)
    write_json(folder / "config.json", written)
    if not _same_rope(model.config, type(model.config).from_pretrained(folder)):
        raise NotSupported(
            f"{facts.architecture} does not read its own saved positions back; this model cannot be exported"
        )
    return notes


# config.json


def _complete(written: dict[str, Any], config: PreTrainedConfig, facts: ModelFacts) -> list[str]:
    """Adds the keys of other readers to a saved configuration, `written`, in place; returns notes for the user."""
    for key in ("_name_or_path", "name_or_path"):
        written.pop(key, None)
    section = _section(written)
    section.pop("longspan", None)
    parameters = rope_parameters(text_config(config))
    if parameters is None:
        return []
    notes = []
    saved = section["rope_parameters"]
    nested = parameters is not text_config(config).rope_parameters
    scaled = next(v for k, v in saved.items() if v == parameters) if nested else saved
    scaled.update(_for_vllm(scaled))
    kind = section["model_type"]
    if nested and not kind.startswith("gemma3"):
        notes.append(f"transformers 4 does not know {kind}'s positions by layer: load the folder with transformers 5")
    else:
        _for_transformers_4(section, scaled, saved if nested else None)
    if kind in _STRICT_IN_4 and scaled["rope_type"] != "default":
        notes.append(f"transformers 4 refuses {kind} with {scaled['rope_type']}: load the folder with transformers 5")
    if scaled["rope_type"] in _SCALED_BY_VLLM and not kind.startswith("gemma3"):
        section["max_position_embeddings"] = facts.window
        notes.append(
            f"max_position_embeddings stays {facts.window:,}: vLLM multiplies it by the factor of {scaled['rope_type']} scaling"
        )
    return notes


def _for_vllm(parameters: dict[str, Any]) -> dict[str, Any]:
    """The magnitude of cos and sin as vLLM reads it."""
    magnitude, factor = parameters.get("attention_factor"), parameters.get("factor", 1.0)
    if magnitude is None:
        return {}
    if parameters["rope_type"] == "longrope":
        return {"short_mscale": magnitude, "long_mscale": magnitude}
    if parameters["rope_type"] == "yarn" and not math.isclose(standard := 0.1 * math.log(factor) + 1, magnitude):
        return {"attn_factor": magnitude / standard}
    return {}


def _for_transformers_4(section: dict[str, Any], scaled: dict[str, Any], by_layer: dict[str, Any] | None) -> None:
    """Adds the keys of transformers 4.

    transformers 5 reads `rope_scaling`, where it is present, in place of `rope_parameters`, so it must be complete; unscaled
    positions have none.
    """
    section["rope_theta"] = scaled["rope_theta"]
    if "partial_rotary_factor" in scaled:
        section["partial_rotary_factor"] = scaled["partial_rotary_factor"]
    if by_layer is not None:
        section["rope_local_base_freq"] = by_layer["sliding_attention"]["rope_theta"]
    if section["model_type"] == "gpt_neox":
        section["rotary_emb_base"], section["rotary_pct"] = scaled["rope_theta"], scaled["partial_rotary_factor"]
    if scaled["rope_type"] != "default":
        section["rope_scaling"] = dict(scaled)


def _same_rope(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    """True where both have the same rotary settings; keys for other readers do not count."""
    first, second = rope_parameters(text_config(one)), rope_parameters(text_config(other))
    return (first is None) == (second is None) and all((second or {}).get(k) == v for k, v in (first or {}).items())


def _section(written: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration."""
    return written.get("text_config", written)


def _own_dtype(folder: Path) -> torch.dtype:
    """The dtype that the checkpoint says it has."""
    written = read_json(folder / "config.json")
    kind = written.get("dtype") or written.get("torch_dtype") or _section(written).get("dtype")
    return models.pick_dtype(kind, "cpu")
