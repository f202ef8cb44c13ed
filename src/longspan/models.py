"""Loads models by a built-in name, a folder, a hub id or a GGUF file.

Each becomes a folder of safetensors with a tokenizer first (`longspan.util.fetching`). Weights are read as safetensors only, and
code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import longspan.lm  # noqa: F401 - makes transformers know the model type
from longspan.apply import apply
from longspan.core.facts import ModelFacts, facts_of, text_config
from longspan.core.method import Combination, Method, catalogue, combination, unknown_names
from longspan.hf.parts import is_part, load_parts
from longspan.util import fetching
from longspan.util.errors import LongspanError, NotSupported, SpecError, nearest
from longspan.util.fetching import ALIASES, Alias, Fetched, Shipped, check_whole, digest, reading, reason

Name = str | Path
"""A built-in name, a folder, a hub id (`owner/name`) or a path that ends in .gguf."""


_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
_DEFAULT_DTYPES = {"cuda": torch.bfloat16, "mps": torch.float16}
_NOT_IDENTITY = ("transformers_version", "_name_or_path", "name_or_path")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def aliases() -> dict[str, Alias]:
    """The built-in models by name, as a new dict."""
    return dict(ALIASES)


def load(
    name: Name,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    method: str | Method | Combination | None = None,
    length: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode and its tokenizer, which pads on the left.

    dtype: by default bfloat16 on CUDA, float16 on MPS, float32 on a CPU. device: by default the first accelerator, else the CPU.
    method, length: as for `apply`, checked before weights load; by default the method that the model was saved with.
    Raises `LongspanError` for a model that cannot be found, read or run, and for a method that cannot work on it.
    """

    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    folder = ready_folder(name)
    config = _read_config(folder)
    methods = _to_apply(folder, config, method)
    facts = _facts(config)
    resolved = None if methods is None else methods.resolve(facts, length)
    tokenizer = _read_tokenizer(folder)
    model = _read_weights(folder, config, kind, where)
    model.name_or_path = str(name)
    if methods is None or resolved is None:
        return model, tokenizer
    load_parts(model, resolved, facts, _weight_files(folder))
    return apply(model, methods, length=length), tokenizer


def inspect_model(name: Name) -> ModelFacts:
    """The facts of a model, from its configuration alone. Raises `LongspanError` as `load` does."""
    return _facts(read_config(name))


def read_config(name: Name) -> PreTrainedConfig:
    """The model's configuration; from the hub nothing else is downloaded. Raises `LongspanError` as `load` does."""
    folder = local_folder(name)
    if folder is None and _kind(name) == "hub":
        folder = fetching.from_hub(str(name), ["config.json"])
    folder = folder or ready_folder(name)
    config = _read_config(folder)
    _to_apply(folder, config, None)
    return config


def saved_methods(name: Name) -> Combination:
    """The methods that a model was saved with, built in or put on; none for a model that was saved without any."""
    folder = ready_folder(name)
    return _parse_saved(folder, saved_entry(folder)) or Combination(())


def describe(model: PreTrainedModel) -> str:
    """One line of text: `smollm2-135m · LlamaForCausalLM · 134.5 M parameters · window 8,192 · float32 on cpu`."""
    name = str(model.name_or_path or "")
    name = Path(name).name if Path(name).exists() else name
    count = sum(p.numel() for p in model.parameters())
    size = f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"
    window = f"window {facts_of(model).window:,}"
    parts = [name, type(model).__name__, f"{size} parameters", window]
    return " · ".join([*filter(None, parts), f"{str(model.dtype).removeprefix('torch.')} on {model.device}"])


def fingerprint(name: Name) -> str:
    """The sha256, in hex, of all that decides a model's output: weights, configuration, tokenizer and chat template."""
    folder = ready_folder(name)
    total = hashlib.sha256()
    for path in _weight_files(folder):
        total.update(f"{path.name} {digest(path)}\n".encode())
    # The path and the version of transformers in a configuration do not matter.
    config = {k: v for k, v in _read_json(folder / "config.json").items() if k not in _NOT_IDENTITY}
    total.update(json.dumps(config, sort_keys=True).encode())
    for part in (*_TOKENIZER_FILES, "chat_template.jinja"):
        if (folder / part).is_file():
            total.update(f"{part} {digest(folder / part)}\n".encode())
    return total.hexdigest()


def local_folder(name: Name) -> Path | None:
    """The folder of the model's files, or None where they must be downloaded or converted first.

    Raises `LongspanError` for a name that cannot be a model.
    """
    kind = _kind(name)
    if kind == "alias":
        alias = ALIASES[str(name)]
        if isinstance(alias, Fetched):
            return fetching.converted(alias.sha256) or _whole_in_hub_cache(alias.hub)
        assert isinstance(alias, Shipped)
        return alias.folder
    if kind == "hub":
        return _whole_in_hub_cache(str(name))
    path = Path(name).expanduser()
    return path if kind == "folder" else fetching.converted(digest(path))


def ready_folder(name: Name) -> Path:
    """The folder of the model's files, downloaded and converted where necessary.

    Raises `LongspanError` where that fails.
    """
    folder, kind = local_folder(name), _kind(name)
    if kind == "alias":
        alias = ALIASES[str(name)]
        if not isinstance(alias, Fetched):
            assert folder is not None
            return folder
        if folder is not None and not (folder / fetching.MANIFEST).is_file():
            fetching.say(f"{name}: using {alias.hub} from the hub's cache")
        return folder or fetching.fetch(alias)
    if kind == "hub":
        return folder or fetching.from_hub(str(name), fetching.HUB_FILES)
    return folder or fetching.convert_file(Path(name).expanduser())


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this name, by default the first accelerator or the CPU.

    Raises `LongspanError` where there is none.
    """
    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LongspanError(f"there is no device {device!r}; use cpu, cuda, cuda:1 or mps") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        has = f"this machine has {count}: cuda:0 to cuda:{count - 1}" if count else "torch finds no CUDA here"
        raise NotSupported(f"device {found} cannot be used: {has}. Use cpu, or leave the device out")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise NotSupported("device mps cannot be used: torch finds no Metal here. Use cpu, or leave the device out")
    if found.type not in ("cpu", "cuda", "mps"):
        raise NotSupported(f"device {found} is not supported; use cpu, cuda or mps")
    return found


def pick_dtype(dtype: str | torch.dtype | None, device: str | torch.device) -> torch.dtype:
    """The dtype of this name, by default that of `device`.

    Raises `LongspanError` for dtypes that weights cannot have.
    """
    if dtype is None:
        return _DEFAULT_DTYPES.get(torch.device(device).type, torch.float32)
    found = _DTYPES.get(str(dtype).removeprefix("torch.").lower())
    if found is None:
        raise LongspanError(f"weights cannot have the dtype {dtype!s}; {nearest(str(dtype), _DTYPES)}")
    return found


def _kind(name: Name) -> Literal["alias", "folder", "file", "hub"]:
    text, path = str(name), Path(name).expanduser()
    if not text.strip():
        raise LongspanError(f"no model named; give a folder, a .gguf file, a hub id or {', '.join(ALIASES)}")
    if text in ALIASES:
        return "alias"
    if path.is_dir():
        return "folder"
    if path.is_file():
        if path.suffix != ".gguf":
            raise LongspanError(
                f"{path} is a file; a model is a folder with config.json and safetensors, or a .gguf file"
            )
        return "file"
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) and path.suffix != ".gguf":
        return "hub"
    if path.suffix == ".gguf" or re.search(r"[/\\]|^[.~]", text):
        raise LongspanError(f"there is no folder or file {path}")
    raise LongspanError(
        f"there is no model {text!r}: neither built in nor a folder here; {nearest(text, ALIASES)}. "
        "A hub id is written owner/name"
    )


def _whole_in_hub_cache(name: str) -> Path | None:
    """The folder of a hub model that was downloaded before, with weights and tokenizer; else None."""
    folder = fetching.in_hub_cache(name)
    if folder is None or not any((folder / part).is_file() for part in _TOKENIZER_FILES):
        return None
    try:
        _weight_files(folder)
    except LongspanError:
        return None
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = "a model's folder has one, beside its safetensors"
        if (path.parent / "adapter_config.json").is_file():
            hint = "it holds an adapter: merge it into its model first"
        elif (inner := path.parent / "model" / path.name).is_file():
            hint = f"a training's model is in its folder {inner.parent}"
        raise LongspanError(f"there is no {path.name} in {path.parent}; {hint}") from error
    except (OSError, ValueError) as error:
        raise LongspanError(f"{path} cannot be read: {reason(error)}; copy the model again") from error
    if not isinstance(value, dict):
        raise LongspanError(f"{path} is not a JSON object; copy the model again")
    return value


def _read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder. Raises `NotSupported` where it is not of a decoder-only model."""
    _know_type(folder)
    with reading(f"{folder}/config.json is not of a model of transformers"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kinds = config.architectures or []
    if getattr(config, "is_encoder_decoder", False):
        raise NotSupported(
            f"{', '.join(kinds) or config.model_type} in {folder} has an encoder, and longspan loads decoder-only models. "
            'Load it with transformers, then longspan.apply(model, "unlimiformer") works on it'
        )
    if kinds and not any(k.endswith(_CAUSAL) for k in kinds):
        raise NotSupported(
            f"{', '.join(kinds) or config.model_type} in {folder} is not a decoder-only language model; use one, such as a "
            "LlamaForCausalLM. BERT and RoBERTa become encoders for long texts by `longspan apply` (longformer, bigbird)"
        )
    return config


def _know_type(folder: Path) -> None:
    """Has the methods register their types of models where transformers does not know the folder's.

    Raises `NotSupported` where a user's own file registers it and is not loaded.
    """
    kind = str(_read_json(folder / "config.json").get("model_type"))
    if kind in CONFIG_MAPPING:
        return
    catalogue()  # imports every method's file, and RMT's registers its model
    entry = saved_entry(folder)
    if kind not in CONFIG_MAPPING and entry.get("files"):
        raise NotSupported(
            f"{folder} holds a model of the type {kind!r}, built by {entry.get('built_by')}; {_load_first(entry['files'])}"
        )


def saved_entry(folder: Path) -> dict[str, Any]:
    """What the folder's configuration says of the methods that the model was saved with (`apply.config_entry`)."""
    raw = _read_json(folder / "config.json")
    section = raw.get("text_config")
    entry = raw.get("longspan") or (section.get("longspan") if isinstance(section, dict) else None)
    return entry if isinstance(entry, dict) else {}


def _parse_saved(folder: Path, entry: Any) -> Combination | None:
    """The methods of a saved entry; None where it names none.

    Raises `SpecError` for one that is not loaded.
    """
    spec = (entry.get("method") or entry.get("built_by")) if isinstance(entry, dict) else None
    if spec is None:
        return None
    files = entry.get("files")
    if isinstance(spec, str) and files and (unknown := unknown_names(spec)):
        raise SpecError(
            f"{folder} was saved with the method {spec}, and {unknown[0]} is not loaded; {_load_first(files)}"
        )
    return combination(spec)


def _load_first(files: Any) -> str:
    """What to do where a user's own files are not loaded."""
    names = [str(file) for file in (files if isinstance(files, list) else [files])]
    options = " ".join(f"--include {name}" if name.endswith(".py") else f"(import {name})" for name in names)
    return f"it is defined in {', '.join(names)}: add {options} to the command, or import the file in Python first"


def _facts(config: PreTrainedConfig) -> ModelFacts:
    with reading("no model can be built from this configuration"):
        return facts_of(config)


def _to_apply(folder: Path, config: PreTrainedConfig, method: Any) -> Combination | None:
    """The methods to put on the model: `method`, or those that it was saved with; None for none.

    The configuration's entry of them is taken out. Methods that a checkpoint holds wholly (scaled frequencies) are not put on
    again, nor are those that built the model.
    """
    text = text_config(config)
    entry = getattr(text, "longspan", None)
    if entry is not None and not (isinstance(entry, dict) and "built_by" in entry):
        del text.longspan
    if method is not None:
        return combination(method)
    if not isinstance(entry, dict) or "method" not in entry:
        return None
    saved = _parse_saved(folder, entry)
    rest = tuple(m for m in saved.methods if not m.exportable) if saved else ()
    return Combination(rest) if rest else None


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with reading(f"the tokenizer in {folder} cannot be read; copy it from the model's source"):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, padding_side="left"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, sorted. Raises `LongspanError` where they are missing or truncated."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_read_json(index).get("weight_map", {}).values())) if index.is_file() else ["model.safetensors"]
    files = [folder / name for name in names]
    if missing := [f.name for f in files if not f.is_file()]:
        raise NotSupported(_missing_weights(folder, missing))
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise LongspanError(f"{file} is damaged or truncated ({reason(error)}); copy it again") from error
    return files


def _missing_weights(folder: Path, missing: list[str]) -> str:
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]
    if pickles:
        return (
            f"{folder} has its weights as a pickle only ({pickles[0]}), which can run code when it is read; save them as "
            "safetensors at their source: model.save_pretrained(folder)"
        )
    if gguf := next(folder.glob("*.gguf"), None):
        return f"{folder} has no safetensors; name its GGUF file: {gguf}"
    return f"{folder} lacks the file {missing[0]}; copy the model again, with its safetensors"


def _read_weights(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    _weight_files(folder)
    with reading(f"the weights in {folder} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    left_over = [name for name in info["unexpected_keys"] if not is_part(name)]
    check_whole(f"the weights in {folder}", type(model).__name__, info["missing_keys"], left_over)
    return model.eval()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of a folder that has only a tokenizer.

    Raises `LongspanError`.
    """
    folder = ready_folder(name)
    with reading(f"the tokenizer of {name} cannot be read"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of rows of an embedding table: the highest token id plus 1, more than there are tokens where ids have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
