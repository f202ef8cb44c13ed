"""A document that Focused Transformer has read: kept, written to a file, and asked as often as wanted, also by another process.

book = Memory.of(model, ids)
book.save("book.safetensors")
model.generate(**Memory.load("book.safetensors", model).inputs(question_ids), max_new_tokens=50)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, PreTrainedModel

from longspan.core.facts import decoder_of
from longspan.hf import compat
from longspan.hf.site import layer_number
from longspan.memory.focused.cache import FocusedLayer
from longspan.memory.focused.method import Reader, reader_of
from longspan.util.errors import LongspanError, SpecError, writing

AT_ONCE = 2**13
"""Tokens that are read at once, or one context where that is more."""
_KIND = "focused memory"


@dataclass
class Memory:
    """What is known of one document: its `ids` (n,), and for each layer of the model its keys and values. `settings` and
    `model` say what read it."""

    ids: Tensor
    layers: list[FocusedLayer]
    settings: str
    model: str

    @classmethod
    def of(cls, model: PreTrainedModel, input_ids: Tensor) -> Memory:
        """Reads a document, ids (n,) or (1, n) of any length. Raises `NotSupported` for a model without the method."""
        reader = reader_of(model)
        ids = input_ids.reshape(-1)
        if len(ids) == 0 or (input_ids.ndim == 2 and len(input_ids) != 1):
            raise SpecError(
                "focused: a memory is of one document with at least one token; read several one after another"
            )
        cache, decoder = reader.empty_cache(), decoder_of(model)
        modes = [(m, m.training) for m in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                for part in ids.to(model.device).split(max(1, AT_ONCE // reader.local) * reader.local):
                    decoder(input_ids=part[None], use_cache=True, **compat.with_cache(decoder, cache))
        finally:
            for module, training in modes:
                module.training = training
        return cls(ids.cpu(), cast(list[FocusedLayer], cache.layers), _settings(reader), _fingerprint(model))

    def __len__(self) -> int:
        """Tokens of the document."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, wherever they are."""
        stored = [pair[:, :, :size].nbytes for layer in self.layers for pair, size in _parts(layer)]
        return sum(stored) + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def inputs(self, question: Tensor, *, beams: int = 1) -> dict[str, Any]:
        """What `generate` takes to go on after the document with each of some questions, ids (t,) or (questions, t): input_ids
        that begin with the document, attention_mask, and a cache of its own. beams: `num_beams` of that call, or its
        `num_return_sequences` where it samples."""
        rows = question[None] if question.ndim == 1 else question
        if rows.numel() == 0:
            raise SpecError("focused: a question is empty; give at least one token")
        layers = [layer.copy() for layer in self.layers]
        if len(rows) * beams > 1:
            for layer in layers:
                layer.batch_repeat_interleave(len(rows) * beams)
        ids = torch.cat((self.ids.to(rows.device).expand(len(rows), -1), rows), dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), compat.CACHE: Cache(layers=list(layers))}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file that the same model can read again."""
        tensors = {"ids": self.ids}
        for number, layer in enumerate(self.layers):
            tensors |= {f"{number}.key": layer.keys, f"{number}.value": layer.values}
            stored = layer.store.whole() if layer.store else None
            if stored is not None:
                tensors |= {f"{number}.memory.key": stored[0], f"{number}.memory.value": stored[1]}
        said = {"longspan": _KIND, "settings": self.settings, "model": self.model}
        with writing(path):
            save_file({n: x.detach().contiguous().cpu() for n, x in tensors.items()}, str(path), metadata=said)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> Memory:
        """Reads what `save` wrote, onto the model's devices, or into CPU memory where the method offloads. Raises `LongspanError`
        where it is no such file, or another model or other settings made it."""
        reader = reader_of(model)
        try:
            with safe_open(str(path), "pt") as file:
                said = file.metadata() or {}
                _check(said, path, reader, model)
                ids = file.get_tensor("ids")
                layers = cast(list[FocusedLayer], reader.empty_cache().layers)
                for module in reader.site.attention_modules:
                    number = layer_number(module)
                    _fill(layers[number], number, file, len(ids), next(module.parameters()).device, model.dtype)
        except (SafetensorError, OSError) as error:
            raise LongspanError(f"{path} cannot be read as a memory: {error}; save it again") from error
        return cls(ids, layers, said["settings"], said["model"])


def _fill(layer: FocusedLayer, number: int, file: Any, seen: int, device: torch.device, dtype: torch.dtype) -> None:
    """Puts a file's keys and values of one layer into it."""
    key, value = (file.get_tensor(f"{number}.{name}").to(device, dtype) for name in ("key", "value"))
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    layer.seen, layer.base = seen, seen - key.shape[2]
    if layer.store is not None and layer.base:
        to = torch.device("cpu") if layer.offloaded else device
        layer.store.append(*(file.get_tensor(f"{number}.memory.{name}").to(to, dtype) for name in ("key", "value")))


def _check(said: dict[str, str], path: str | Path, reader: Reader, model: PreTrainedModel) -> None:
    if said.get("longspan") != _KIND:
        raise LongspanError(f"{path} holds no memory; write one with Memory.save")
    if said.get("settings") != _settings(reader):
        raise LongspanError(
            f"{path} was read under other settings ({said.get('settings')}; here {_settings(reader)}); apply these, or read the "
            "document again"
        )
    if said.get("model") != _fingerprint(model):
        raise LongspanError(
            f"{path} was made by another model, or before this one was trained further; read the document again"
        )


def _parts(layer: FocusedLayer) -> list[tuple[Tensor, int]]:
    return [(x, size) for pair, size in (layer.store.parts() if layer.store else []) for x in pair]


def _settings(reader: Reader) -> str:
    """What decides keys and values; where they lie and how they are searched does not."""
    made = reader.method
    return f"local={made.local},layers={made.layers},k={made.k},positions={made.positions}"


def _fingerprint(model: PreTrainedModel) -> str:
    """sha256, in hex, of some numbers of every weight, evenly spread, which any training changes. As bfloat16, so that a model in
    another dtype is the same one."""
    total = hashlib.sha256()
    for name, weight in sorted(model.named_parameters(), key=lambda one: one[0]):
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 1024)].bfloat16().cpu().contiguous()
        total.update(f"{name} {tuple(weight.shape)}\n".encode())
        total.update(some.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
