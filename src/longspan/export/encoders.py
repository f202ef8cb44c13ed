"""A trained BERT or RoBERTa as a Longformer or BigBird, as both papers begin.

Every weight is kept, the table of positions is repeated up to the new length, and the second projections of a Longformer begin
as copies of the first. The result is transformers' own LongformerModel or BigBirdModel (or …ForMaskedLM), which plain
transformers loads. It gives the old model's states where the window covers the text. For longer texts it is trained further:
Beltagy 2020, section 5, takes 65,000 steps of masked language modelling at 4,096 tokens. There the copied table alone gives
1.957 bits per character in the base size, random positions 10.299.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from longspan import models
from longspan.core.method import Combination, Method, catalogue, combination
from longspan.export.folder import ExportReport, copy_tokenizer, filling, free_place, size_of
from longspan.hf.encoder_form import EncoderForm
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
# Names of the weights of the head for masked tokens: as in BERT, and as in RoBERTa.
_HEADS = {
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.decoder.": "lm_head.decoder.",
    "cls.predictions.bias": "lm_head.bias",
}


class EncoderReport(ExportReport):
    """The files of an encoder; `vllm` is empty, since an encoder generates no text."""

    @property
    def vllm(self) -> str:
        return ""

    @property
    def auto_class(self) -> str:
        return "AutoModel"


def longer_encoder(
    model: PreTrainedModel, method: str | Method | Combination, *, length: int = 4096
) -> PreTrainedModel:
    """The encoder `model` as a Longformer or BigBird that reads `length` tokens, in evaluation mode.

    model: an encoder, or one with its head for masked tokens.
    Raises `NotSupported` for a model of another family and for settings that transformers' classes do not have.
    """
    method, form = _with_form(method)
    _check(model.config, method, form, length)
    has_head = type(model).__name__.endswith("ForMaskedLM")
    if not has_head and model.base_model is not model:
        raise NotSupported(
            f"{type(model).__name__} has a head for another task; convert its encoder, model.base_model, and train a head on that"
        )
    config = _config(model.config, form, length)
    pooler = {} if has_head else {"add_pooling_layer": model.pooler is not None}
    longer: Any = (form.masked if has_head else form.encoder)(config, **pooler)
    weights = _renamed(model, longer, form)
    table = next(name for name in weights if name.endswith("position_embeddings.weight"))
    weights[table] = _positions(weights[table], model.config, config, length)
    missing, unexpected = longer.load_state_dict(weights, strict=False)
    # BigBird with a head for masked tokens has a pooler that nothing reads.
    if unexpected or any("pooler" not in name or not has_head for name in missing):
        raise NotSupported(f"{type(model).__name__} has other weights than its family: {(unexpected + missing)[0]}")
    return longer.to(model.dtype).eval()


def converts_encoders(method: Combination) -> bool:
    """True where one of the methods is put on a trained encoder by converting it."""
    return any(m.encoder_form() is not None for m in method.methods)


def _with_form(method: str | Method | Combination) -> tuple[Method, EncoderForm]:
    """The one method, and what becomes of an encoder with it.

    Raises `NotSupported` for any other.
    """
    methods = combination(method).methods
    form = methods[0].encoder_form() if len(methods) == 1 else None
    if form is None:
        names = [name for name, cls in catalogue().items() if cls.encoder_form is not Method.encoder_form]
        raise NotSupported(
            f"{combination(method).spec}: a trained encoder can be converted to {' or '.join(names)}, one of them alone; write, "
            "for example, longformer:window=512"
        )
    return methods[0], form


def _check(config: PreTrainedConfig, method: Method, form: EncoderForm, length: int) -> None:
    if config.model_type not in FAMILIES or getattr(config, "is_decoder", False):
        raise NotSupported(
            f"{method.name} is put on trained encoders of the families {', '.join(FAMILIES)}, and this is a {config.model_type}; "
            f"train a model with it (longspan train, model.attention={method.name}), or use yarn, self-extend or streaming"
        )
    window = _window(config)
    if length < window:
        raise SpecError(f"length={length:,} is shorter than the {window:,} tokens that the model reads already")
    form.check(length)


def _offset(config: PreTrainedConfig) -> int:
    """The row of the first token in the table of positions."""
    return 0 if config.model_type in ("bert", "big_bird") else config.pad_token_id + 1


def _window(config: PreTrainedConfig) -> int:
    """How many tokens the model reads."""
    return config.max_position_embeddings - _offset(config)


def _config(old: PreTrainedConfig, form: EncoderForm, length: int) -> PreTrainedConfig:
    """The new model's configuration, with the settings of `old` that both families have."""
    settings = {name: getattr(old, name) for name in _SAME}
    return form.config(old, {**settings, "sep_token_id": old.eos_token_id}, length)


def _renamed(model: PreTrainedModel, longer: PreTrainedModel, form: EncoderForm) -> dict[str, Tensor]:
    """The weights of `model` under their names in `longer`, with copies for its second projections."""
    old, new = (f"{m.base_model_prefix}." if m.base_model is not m else "" for m in (model, longer))
    if old and (model.config.model_type == "bert") != form.bert_names and model.config.hidden_act != "gelu":
        raise NotSupported(
            f"the head for masked tokens would change its activation, {model.config.hidden_act}; convert model.base_model"
        )
    weights = {}
    for name, weight in model.state_dict().items():
        name = _new_name(new + name.removeprefix(old) if name.startswith(old) else name, form)
        weights[name] = weight
        weights |= {name.replace(part, copy): weight for part, copy in form.copied if part in name}
    return weights


def _new_name(name: str, form: EncoderForm) -> str:
    """A weight's name in the new model, of which the family names the head and the pooler."""
    for bert, roberta in _HEADS.items():
        name = name.replace(*((roberta, bert) if form.bert_names else (bert, roberta)))
    return name.replace("pooler.dense.", "pooler.") if form.bert_names else name


def _positions(table: Tensor, old: PreTrainedConfig, new: PreTrainedConfig, length: int) -> Tensor:
    """The table (rows, hidden) for `length` tokens: the old positions repeated, after the rows that are not positions."""
    rows = table[_offset(old) :]
    repeated = rows.repeat(-(-length // len(rows)), 1)[:length]
    return torch.cat((table.new_zeros(_offset(new), table.shape[1]), repeated))


def export_encoder(
    model_name: str | Path,
    method: str | Method | Combination,
    out: str | Path,
    *,
    length: int | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> EncoderReport:
    """Saves what `longer_encoder` makes of a model's folder or hub id in the folder `out`.

    length: in tokens, 4,096 if left out. dtype: that of the saved weights; the model's own if left out.
    """
    (converting, form), length = _with_form(method), length or 4096
    place = free_place(Path(out), overwrite, models.local_folder(model_name))
    source = models.ready_folder(model_name)
    with reading(f"{source}/config.json is not of a model that transformers itself knows"):
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    _check(config, converting, form, length)
    model = longer_encoder(_load(source, config, dtype), converting, length=length)
    with filling(place) as folder, quiet():
        copy_tokenizer(source, folder, length)
        with reading(f"{source} has no tokenizer that can be read; copy it from the model's source"):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        model.config.sep_token_id = tokenizer.sep_token_id
        model.save_pretrained(folder)
        size = size_of(folder)
    untrained = (
        f"positions past {_window(config):,} tokens are copies that were never trained: train it on long texts first"
    )
    return EncoderReport(
        folder=str(out),
        model=str(model_name),
        method=converting.spec,
        dtype=str(model.dtype).removeprefix("torch."),
        bytes=size,
        window=length,
        reach=length,
        max_position_embeddings=model.config.max_position_embeddings,
        rope_parameters=None,
        notes=(untrained, form.note),
    )


def _load(source: Path, config: PreTrainedConfig, dtype: str | torch.dtype | None) -> PreTrainedModel:
    """The model with its head for masked tokens where the folder has one, else the encoder alone."""
    has_head = any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in config.architectures or [])
    cls = AutoModelForMaskedLM if has_head else AutoModel
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
    if not has_head and any("pooler" in name for name in info["missing_keys"]):
        model.pooler = None
    return model
