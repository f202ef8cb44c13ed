"""A trained BERT or RoBERTa as a Longformer or BigBird, as both papers begin: every weight kept, the table of positions copied
one after another up to the new length, and, in a Longformer, second projections that begin as copies of the first.

The result is transformers' own LongformerModel or BigBirdModel (or …ForMaskedLM), which plain transformers loads. It reads as
the old model read where the window covers the text; to be good on longer ones it is trained further (Longformer: 65,000
steps of masked language modelling at 4,096 tokens; its table of positions copied without training already gives 1.957 bits
per character in the base size, with random positions 10.299; section 5 of the paper).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BigBirdConfig,
    BigBirdForMaskedLM,
    BigBirdModel,
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from longspan import models
from longspan.attention.bigbird import BigBird
from longspan.attention.longformer.pattern import Longformer
from longspan.core.method import Combination, Method, combination
from longspan.export.folder import ExportReport, copy_tokenizer, filling, free_place
from longspan.util.errors import NotSupported, SpecError
from longspan.util.fetching import check_whole, quiet, reading

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
_INNER = re.compile(r"(^|\.)(embeddings|encoder)\.|lora_")
# The two ways in which transformers names the head for masked tokens.
_HEADS = {
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.decoder.": "lm_head.decoder.",
    "cls.predictions.bias": "lm_head.bias",
}


class EncoderReport(ExportReport):
    """What was written; no server of generated text has a use for it."""

    @property
    def vllm(self) -> str:
        return ""

    @property
    def python(self) -> str:
        return (
            "from transformers import AutoModel, AutoTokenizer\n"
            f"model = AutoModel.from_pretrained({self.folder!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({self.folder!r})"
        )


def longer_encoder(
    model: PreTrainedModel, method: str | Method | Combination, *, length: int = 4096
) -> PreTrainedModel:
    """`model`, an encoder or one with its head for masked tokens, as a Longformer or BigBird for `length` tokens.

    Raises `NotSupported` for a model of another family and for settings that transformers' classes have not.
    """
    wanted = _wanted(method)
    _check(model.config, wanted, length)
    headed = type(model).__name__.endswith("ForMaskedLM")
    if not headed and model.base_model is not model:
        raise NotSupported(
            f"{type(model).__name__} has a head for another task; convert its encoder, model.base_model, and train a head on that"
        )
    config = _config(model.config, wanted, length)
    classes: dict[type, tuple[Any, Any]] = {
        Longformer: (LongformerModel, LongformerForMaskedLM),
        BigBird: (BigBirdModel, BigBirdForMaskedLM),
    }
    cls = classes[type(wanted)][headed]
    made = cls(config) if headed else cls(config, add_pooling_layer=model.pooler is not None)
    weights = _renamed(model, made)
    table = next(name for name in weights if name.endswith("position_embeddings.weight"))
    weights[table] = _positions(weights[table], model.config, config, length)
    missing, unexpected = made.load_state_dict(weights, strict=False)
    # BigBird with a head for masked tokens has a pooler that nothing reads.
    if unexpected or any("pooler" not in name or not headed for name in missing):
        raise NotSupported(f"{type(model).__name__} has other weights than its family: {(unexpected + missing)[0]}")
    return made.to(model.dtype).eval()


def _wanted(method: str | Method | Combination) -> Longformer | BigBird:
    methods = combination(method).methods
    if len(methods) != 1 or not isinstance(methods[0], (Longformer, BigBird)):
        raise NotSupported("an encoder becomes a longformer or a bigbird, such as longformer:window=512")
    return methods[0]


def _check(config: PreTrainedConfig, wanted: Longformer | BigBird, length: int) -> None:
    if config.model_type not in FAMILIES or getattr(config, "is_decoder", False):
        raise NotSupported(
            f"{wanted.name} is put on trained encoders of the families {', '.join(FAMILIES)}, and this is a {config.model_type}; "
            f"train a model with it (longspan train, model.attention={wanted.name}), or use yarn, self-extend or streaming"
        )
    window = _window(config)
    if length < window:
        raise SpecError(f"length={length:,} is shorter than the {window:,} tokens that the model reads already")
    known = Longformer(window=wanted.window) if isinstance(wanted, Longformer) else BigBird(wanted.block, wanted.random)
    if wanted != known:
        raise NotSupported(
            f"{wanted.spec}: transformers' {type(wanted).__name__} has no such settings; use {known.spec}"
            + (" and name global tokens in each call with global_attention_mask" if wanted.globals else "")
        )
    if isinstance(wanted, Longformer) and wanted.window % 2:
        raise SpecError(f"an encoder sees half of the window on either side; use window={wanted.window + 1}")
    if isinstance(wanted, BigBird) and length % wanted.block:
        raise SpecError(f"length={length:,} must be a multiple of block={wanted.block}")


def _offset(config: PreTrainedConfig) -> int:
    """The row of the first token in the table of positions."""
    return 0 if config.model_type in ("bert", "big_bird") else config.pad_token_id + 1


def _window(config: PreTrainedConfig) -> int:
    return config.max_position_embeddings - _offset(config)


def _config(old: PreTrainedConfig, wanted: Longformer | BigBird, length: int) -> PreTrainedConfig:
    same = {name: getattr(old, name) for name in _SAME}
    same["sep_token_id"] = old.eos_token_id
    if isinstance(wanted, Longformer):
        return LongformerConfig(
            **same, attention_window=wanted.window, max_position_embeddings=length + old.pad_token_id + 1
        )
    return BigBirdConfig(
        **same, block_size=wanted.block, num_random_blocks=wanted.random, max_position_embeddings=length
    )


def _renamed(model: PreTrainedModel, made: PreTrainedModel) -> dict[str, Tensor]:
    """The old weights under the names of the new model, with copies where that has second projections."""
    old, new = (f"{m.base_model_prefix}." if m.base_model is not m else "" for m in (model, made))
    bigbird = isinstance(made, (BigBirdModel, BigBirdForMaskedLM))
    if old and (model.config.model_type == "bert") != bigbird and model.config.hidden_act != "gelu":
        raise NotSupported(
            f"the head for masked tokens would change its activation, {model.config.hidden_act}; convert model.base_model"
        )
    weights = {}
    for name, weight in model.state_dict().items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
        for theirs, ours in _HEADS.items():
            name = name.replace(*((ours, theirs) if bigbird else (theirs, ours)))
        if bigbird:
            name = name.replace("pooler.dense.", "pooler.")
        weights[name] = weight
        if not bigbird:
            for part in ("query", "key", "value"):
                if f".self.{part}." in name:
                    weights[name.replace(f".{part}.", f".{part}_global.")] = weight
    return weights


def _positions(table: Tensor, old: PreTrainedConfig, new: PreTrainedConfig, length: int) -> Tensor:
    """The table (rows, hidden) for `length` tokens: the old rows again and again, behind the rows that are no position."""
    rows = table[_offset(old) :]
    many = rows.repeat(-(-length // len(rows)), 1)[:length]
    return torch.cat((table.new_zeros(_offset(new), table.shape[1]), many))


def export_encoder(
    name: str | Path,
    method: str | Method | Combination,
    out: str | Path,
    *,
    length: int | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> EncoderReport:
    """`longer_encoder` from a model's folder, or hub id, to the folder `out`; length: 4,096 tokens where it is left out."""
    wanted, length = _wanted(method), length or 4096
    place = free_place(Path(out), overwrite, models.local_folder(name))
    source = models.ready_folder(name)
    with reading(f"{source}/config.json is of no model that transformers itself knows"):
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    _check(config, wanted, length)
    model = longer_encoder(_load(source, config, dtype), wanted, length=length)
    with filling(place) as folder, quiet():
        copy_tokenizer(source, folder, length)
        with reading(f"{source} has no tokenizer that can be read; copy it from the model's source"):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        model.config.sep_token_id = tokenizer.sep_token_id
        model.save_pretrained(folder)
        size = sum(p.stat().st_size for p in folder.iterdir())
    return EncoderReport(
        folder=str(out),
        model=str(name),
        method=wanted.spec,
        dtype=str(model.dtype).removeprefix("torch."),
        bytes=size,
        window=length,
        reach=length,
        max_position_embeddings=model.config.max_position_embeddings,
        rope_parameters=None,
        notes=tuple(_notes(config, wanted)),
    )


def _load(source: Path, config: PreTrainedConfig, dtype: str | torch.dtype | None) -> PreTrainedModel:
    """The model with its head for masked tokens where the folder has one, else the encoder alone."""
    headed = any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in config.architectures or [])
    cls = AutoModelForMaskedLM if headed else AutoModel
    kind: Any = "auto" if dtype is None else models.pick_dtype(dtype, "cpu")
    with reading(f"the weights in {source} cannot be loaded"):
        loaded: Any = cls.from_pretrained(
            source,
            dtype=kind,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    left_over = [name for name in info["unexpected_keys"] if _INNER.search(name)]  # heads are left
    check_whole(f"the weights in {source}", type(model).__name__, missing, left_over)
    if not headed and any("pooler" in name for name in info["missing_keys"]):
        model.pooler = None
    return model


def _notes(config: PreTrainedConfig, wanted: Longformer | BigBird) -> list[str]:
    notes = [
        f"past {_window(config):,} tokens its positions are copies that were never trained: train it on long texts before use"
    ]
    if isinstance(wanted, Longformer):
        notes.append("name the global tokens in each call: global_attention_mask=(batch, tokens), 1 for them")
    else:
        notes.append(
            "transformers draws random blocks in training only; in evaluation the first block stands in their place"
        )
    return notes
