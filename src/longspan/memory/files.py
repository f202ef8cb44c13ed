"""The file of a memory: safetensors with what the cache holds, and metadata that says what may read it.

    kind      what filled the cache: plain, streaming, focused, landmark, gist
    reading   the settings that decide keys and values, of all methods on the model
    model     fingerprint of the weights; config: of what else decides keys and values
    tokens    length of the document; layers: kind and counts of each layer, as JSON; dtype; method; version

Tensors are named by layer and part, such as `0.key`. Files that earlier versions wrote for one method each are read as this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, PreTrainedModel

from longspan.core.facts import decoder_of, text_config
from longspan.core.method import NoMethod
from longspan.hf import compat
from longspan.hf.site import current
from longspan.memory.base import LayerTensors, TextReader, reader_on, reading_spec, spec_on
from longspan.util.errors import LongspanError, writing
from longspan.util.version import __version__

_MARK = "memory"
_BEFORE = {"focused memory": "focused", "landmark memory": "landmark", "gist tokens": "gist"}
"""Values of `longspan` in the metadata of earlier versions, and the kind that each stands for."""
_CONFIG = ("rope_parameters", "sliding_window", "layer_types", "position", "attention", "memory", "sink")
"""Entries of a configuration that change keys and values of the same weights."""


@dataclass(frozen=True)
class MemoryFile:
    """A file as it was read: tensors on the CPU by name, and the metadata."""

    path: Path
    kind: str
    reading: str | None
    """None where the file does not say, as those of gist tokens did not."""
    method: str
    model: str
    config: str | None
    """None in files of earlier versions."""
    tokens: int
    dtype: torch.dtype | None
    layers: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    chat: bool = False
    model_float16: str | None = None
    """The fingerprint by which a model in float16 is the same one; None in files of earlier versions."""
    by_vectors: bool = False
    """Whether `model` is a fingerprint of the weights' vectors, as it was for landmark and gist."""

    def check(self, model: PreTrainedModel) -> None:
        """Raises `LongspanError` where another model wrote the file, or this one under another method or other settings."""
        reader, spec = reader_on(model), spec_on(model)
        if self.kind != reader.kind:
            raise LongspanError(
                f"{self.path} was read under {self.method}, and the model has {spec} on it; apply that method, or read the text "
                "again"
            )
        here = reader.reading() if self.config is None else reading_spec(model)
        if self.reading not in (None, here):
            raise LongspanError(
                f"{self.path} was read with other settings ({self.reading}; the model has {here}); apply these, or read the text "
                "again"
            )
        if self.by_vectors:
            same = self.model == vectors_fingerprint(model, reader)
        else:
            same = Fingerprints(self.model, self.model_float16).are_of(model)
        if not same or self.config not in (None, config_fingerprint(model)):
            raise LongspanError(
                f"{self.path} is of another model, or of this one before it was trained further; read the text again"
            )

    def layer_tensors(self, model: PreTrainedModel) -> LayerTensors:
        """The tensors of a layer by its number, on that layer's device and in the model's dtype."""
        reader, devices, widths = reader_on(model), layer_devices(model), self._widths(model)

        def tensors_of(number: int) -> dict[str, Tensor]:
            lead, device = f"{number}.", devices.get(number, compat.input_device(model))
            found = {n.removeprefix(lead): x for n, x in self.tensors.items() if n.startswith(lead)}
            return {
                name: (x.to(widths[lead + name]) if lead + name in widths else self.cast(x, model)).to(
                    "cpu" if reader.stays_on_cpu(name) else device
                )
                for name, x in found.items()
            }

        return tensors_of

    def _widths(self, model: PreTrainedModel) -> dict[str, torch.dtype]:
        """The dtypes of states, which may stay wide in a model of 16 bits, where `model` is in another than the file's."""
        if self.dtype in (None, model.dtype) or all(layer["kind"] != "state" for layer in self.layers):
            return {}
        reader = reader_on(model)
        layers, tensors = reader.parts(reader.read(torch.zeros(1, dtype=torch.long))[1])
        states = {str(number) for number, layer in enumerate(layers) if layer["kind"] == "state"}
        return {name: x.dtype for name, x in tensors.items() if name.partition(".")[0] in states}

    def cast(self, x: Tensor, model: PreTrainedModel) -> Tensor:
        """x in the model's dtype where it was in that of the model that wrote it."""
        same = x.dtype == self.dtype if self.dtype is not None else x.is_floating_point()
        return x.to(model.dtype) if same else x


def write(
    path: str | Path,
    model: PreTrainedModel,
    cache: Cache | None,
    tokens: int,
    tensors: dict[str, Tensor],
    *,
    chat: bool = False,
    weights: Fingerprints | None = None,
) -> None:
    """Writes a cache of `model` and further tensors, such as `ids`.

    tokens: length of the document; chat: `Memory.chat`; weights: of the model when it read, if known.
    """
    reader, weights = reader_on(model), weights or fingerprints(model)
    layers, parts = reader.parts(cache) if cache is not None else ([], {})
    metadata = {
        "longspan": _MARK,
        "version": __version__,
        "kind": reader.kind,
        "method": spec_on(model),
        "reading": reading_spec(model),
        "model": weights.bfloat16,
        "model_float16": weights.float16 or "",
        "config": config_fingerprint(model),
        "tokens": str(tokens),
        "chat": str(chat).lower(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": json.dumps(layers),
    }
    save(path, {**tensors, **parts}, metadata)


def method_of(path: str | Path) -> str | None:
    """The spec that a file's document was read under; None for the plain model.

    Raises `LongspanError` for no such file.
    """
    with opened(path) as (metadata, _):
        mark = metadata["longspan"]
        spec = f"focused:{metadata['settings']}" if _BEFORE.get(mark) == "focused" else metadata["method"]
    return None if spec == NoMethod.name else spec


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[tuple[dict[str, str], Any]]:
    """A memory's file: its metadata, and what gives its tensors.

    Raises `LongspanError` where it is none or is damaged.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("longspan") not in (_MARK, *_BEFORE):
                raise LongspanError(f"{path} holds no memory; write one with longspan read, or Memory.save")
            yield metadata, file
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise LongspanError(
            f"{path} cannot be read as a memory: {error}; it may be cut short: read the text again"
        ) from error


def save(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file with metadata. Raises `OSError` that names the file."""
    with writing(path):
        save_file({n: x.detach().contiguous().cpu() for n, x in tensors.items()}, str(path), metadata=metadata)


def read(path: str | Path, model: PreTrainedModel) -> MemoryFile:
    """A file that `model` may read.

    Raises `LongspanError` where it is none, is damaged, or was written by another model or under another method.
    """
    with opened(path) as (metadata, file):
        found = _parsed(Path(path), metadata, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    found.check(model)
    return found


def _parsed(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> MemoryFile:
    if metadata["longspan"] in _BEFORE:
        return _of_earlier_version(path, metadata, tensors)
    return MemoryFile(
        path,
        metadata["kind"],
        metadata["reading"],
        metadata["method"],
        metadata["model"],
        metadata["config"],
        int(metadata["tokens"]),
        getattr(torch, metadata["dtype"]),
        json.loads(metadata["layers"]),
        tensors,
        model_float16=metadata.get("model_float16"),
        chat=metadata["chat"] == "true",
    )


def _of_earlier_version(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> MemoryFile:
    """A file with the metadata that focused, landmark and gist each had of their own."""
    kind = _BEFORE[metadata["longspan"]]
    short = {"keys": "key", "values": "value"}
    tensors = {
        f"{lead}{dot}{short.get(last, last)}": x
        for name, x in tensors.items()
        for lead, dot, last in [name.rpartition(".")]
    }
    numbers = {int(lead) for lead, dot, _ in (name.partition(".") for name in tensors) if dot}
    tokens = tensors["ids"].shape[-1] if "ids" in tensors else int(tensors["shift"].max())
    layer = {"kind": {"focused": "focused", "landmark": "pages", "gist": "full"}[kind], "seen": tokens}
    reading = {"focused": metadata.get("settings"), "landmark": metadata.get("method"), "gist": None}[kind]
    method = f"focused:{metadata['settings']}" if kind == "focused" else metadata["method"]
    return MemoryFile(
        path,
        kind,
        reading,
        method,
        metadata["model"],
        None,
        tokens,
        None,
        [layer] * len(numbers),
        tensors,
        by_vectors=kind != "focused",
    )


def layer_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """The device of each layer's attention, by the layer's number."""
    found: dict[int, torch.device] = {}
    for module in decoder_of(model).modules():
        number, weight = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(number, int) and weight is not None and weight.device.type != "meta":
            found.setdefault(number, weight.device)
    return found


# Fingerprints


@dataclass(frozen=True)
class Fingerprints:
    """Of a model's weights as bfloat16 and as float16: rounded to one of the two, those of a model in another dtype are the same.
    float16: None where it is not known."""

    bfloat16: str
    float16: str | None

    def are_of(self, model: PreTrainedModel) -> bool:
        """Whether these are `model`'s, in any dtype."""
        if self.bfloat16 == weights_fingerprint(model):
            return True
        return self.float16 == weights_fingerprint(model, torch.float16)


def fingerprints(model: PreTrainedModel) -> Fingerprints:
    """Those of a model as it is now."""
    return Fingerprints(weights_fingerprint(model), weights_fingerprint(model, torch.float16))


def weights_fingerprint(model: PreTrainedModel, rounded: torch.dtype = torch.bfloat16) -> str:
    """sha256, in hex, of at most 1,024 numbers of every weight, evenly spread, and of the rows of methods' tokens: what any
    training changes. rounded: to this dtype, so that a model in another one is the same."""
    named = sorted(model.named_parameters(), key=lambda one: one[0])
    flat = ((name, weight.shape, weight.detach().reshape(-1)) for name, weight in named if not weight.is_meta)
    spread = ((name, shape, x[:: max(1, len(x) // 1024)]) for name, shape, x in flat)
    return _digest((*spread, *_token_rows(model)), rounded)


def _token_rows(model: PreTrainedModel) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """The embeddings of the special tokens of methods on the model, which may be all that a training changed."""
    methods, table = current(model), model.get_input_embeddings().weight
    for method in methods.methods if methods else ():
        for id in method.token_ids() if not table.is_meta else ():
            row = table[id].detach()  # type: ignore[index]
            yield f"{method.name} token {id}", row.shape, row


def vectors_fingerprint(model: PreTrainedModel, reader: TextReader) -> str:
    """sha256, in hex, of a special token's row and of all vectors among the weights: what earlier versions wrote for landmark and
    gist."""
    row = model.get_input_embeddings().weight[reader.method.id]  # type: ignore[union-attr, index]
    vectors = sorted(((n, p) for n, p in model.named_parameters() if p.ndim == 1), key=lambda one: one[0])
    named = [(reader.kind, row), *vectors]
    if reader.kind == "gist":
        named.sort(key=lambda one: one[0])
    return _digest((name, x.shape, x.detach()) for name, x in named)


def config_fingerprint(model: PreTrainedModel) -> str:
    """sha256, in hex, of the settings in a model's configuration that change keys and values."""
    config = text_config(model.config)
    settings = {name: value for name in _CONFIG if (value := getattr(config, name, None)) is not None}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _digest(parts: Iterable[tuple[str, torch.Size, Tensor]], rounded: torch.dtype = torch.bfloat16) -> str:
    """sha256, in hex, of names, shapes and numbers, rounded to a dtype of 16 bits."""
    total = hashlib.sha256()
    for name, shape, numbers in parts:
        total.update(f"{name} {tuple(shape)}\n".encode())
        total.update(numbers.cpu().to(rounded).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
