"""Facts of a model from its configuration alone, to refuse an impossible request before weights load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class RopeFacts:
    """The rotary positions of a model.

    dim: rotated channels of a head; window: the training length in tokens, before any scaling that the checkpoint
    already has.
    """

    theta: float
    dim: int
    type: str
    window: int
    per_layer_type: bool
    varies: bool = False
    """Whether frequencies depend on the length of the text, so that rotations at different lengths cannot be composed."""

    @property
    def beyond(self) -> str:
        """The method that reads past the window where positions are scaled already."""
        return "self-extend" if self.varies else "streaming"


@dataclass(frozen=True)
class ModelFacts:
    """Sizes in elements and tokens; `window` is the longest input that the checkpoint promises to read."""

    model_type: str
    architecture: str
    window: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int
    rope: RopeFacts | None
    attention_interface: bool
    attention: str
    """The attention implementation that transformers chooses: `sdpa`, `eager`, …"""
    sliding_window: int | None
    layer_types: frozenset[str]
    """Kinds of layers that the configuration names (`full_attention`, `sliding_attention`, …); empty where it names none."""
    absolute_positions: bool = False
    """Whether positions are added to the embeddings, learned or sinusoidal."""
    encoder_decoder: bool = False
    """Whether an encoder reads the input; `window` is then the encoder's, and `layers` and `heads` are the decoder's."""
    endless: bool = False
    """Whether it reads texts of any length, as a recurrence does."""
    schemes: frozenset[str] = frozenset()
    """Names of the position schemes that the model was trained with, as far as its configuration says."""

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes per token of a full KV cache in `dtype`, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the language model itself, for checkpoints that wrap it."""
    return config.get_text_config(decoder=True)


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The rotary settings that scaling methods change, in place: the flat dict, or the entry for full-attention layers."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return None
    if "rope_theta" in parameters or "rope_type" in parameters:
        return parameters
    return parameters.get("full_attention") or next(iter(parameters.values()))


def _rope_facts(config: PreTrainedConfig, window: int, head_dim: int) -> RopeFacts | None:
    parameters = rope_parameters(config)
    if parameters is None:
        return None
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0
    share = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    original = parameters.get("original_max_position_embeddings") or window
    return RopeFacts(
        theta=float(theta),
        dim=int(head_dim * share),
        type=parameters.get("rope_type", "default"),
        window=int(original),
        per_layer_type=parameters is not getattr(config, "rope_parameters", None),
        varies=_varies(parameters),
    )


def _varies(parameters: dict[str, Any]) -> bool:
    kind = parameters.get("rope_type", "default")
    return "dynamic" in kind or (kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor"))


def facts_of(model_or_config: Any) -> ModelFacts:
    """The facts of a model or of a configuration.

    Of a configuration a model is built on the meta device, to count its parameters. Raises `NotSupported` for anything that is
    not a language model of transformers.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if isinstance(model_or_config, PreTrainedConfig):
        kind = AutoModelForSeq2SeqLM if model_or_config.is_encoder_decoder else AutoModelForCausalLM
        try:
            with torch.device("meta"):
                model = kind.from_config(model_or_config)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise NotSupported(
                f"no language model can be built from a {model_or_config.model_type!r} configuration: {error}"
            ) from error
    else:
        model = model_or_config
    config = text_config(model.config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = _window(config)
    if window < 1:
        raise NotSupported(
            f"the configuration gives a window of {window:,} tokens, and 1 is the least; copy the model again"
        )
    can_set = getattr(type(model), "_can_set_attn_implementation", lambda: True)
    return ModelFacts(
        model_type=config.model_type,
        architecture=type(model).__name__,
        window=window,
        layers=getattr(config, "num_decoder_layers", None) or config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        rope=_rope_facts(config, window, head_dim) if rotary_modules(model) else None,
        attention_interface=bool(can_set()),
        attention=str(config._attn_implementation),
        sliding_window=getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None,
        layer_types=frozenset(getattr(config, "layer_types", None) or ()),
        absolute_positions=_absolute_positions(model),
        encoder_decoder=bool(config.is_encoder_decoder),
        endless=bool(getattr(model, "endless", False)),
        schemes=_schemes(config),
    )


def _schemes(config: PreTrainedConfig) -> frozenset[str]:
    position = getattr(config, "position", None)
    if config.model_type == "longspan" and isinstance(position, str):
        return frozenset(part.partition(":")[0].strip() for part in position.split("+"))
    if config.model_type == "bloom" or getattr(getattr(config, "attn_config", config), "alibi", False):
        return frozenset({"alibi"})
    if config.model_type in ("gpt2", "opt", "gpt_neo", "biogpt"):
        return frozenset({"learned"})
    return frozenset({"rope"} if rope_parameters(config) else ())


def _window(config: PreTrainedConfig) -> int:
    """The longest input in tokens; of an encoder-decoder, the encoder's.

    T5 has no limit: it was trained with 512, which only some of its configurations name.
    """
    names = ["max_position_embeddings"]
    if config.is_encoder_decoder:
        names = ["max_encoder_position_embeddings", "max_position_embeddings", "n_positions"]
    found = next(filter(None, (getattr(config, name, None) for name in names)), None)
    return int(found or (512 if config.is_encoder_decoder else 2048))


def _absolute_positions(model: torch.nn.Module) -> bool:
    """Whether there is a table of positions, by its names in transformers' models, or a longspan scheme that has one."""
    encoding = getattr(getattr(model, "base_model", None), "place", None)
    if encoding is not None:
        return bool(encoding.defines("embed") or encoding.defines("pair_bias"))
    names = {"wpe", "embed_positions", "position_embeddings"}
    return any(name.rpartition(".")[2] in names for name, _ in model.named_modules())


def rotary_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The decoder's rotary modules, which compute angles from the configuration, with their dotted names in the model.

    An image encoder's are left out: they have a configuration of their own.
    """
    decoder = decoder_of(model) if isinstance(model, PreTrainedModel) else model
    inside = {id(m) for m in decoder.modules()}
    found = ((name, m) for name, m in model.named_modules() if hasattr(m, "rope_type") and hasattr(m, "config"))
    return [(name, m) for name, m in found if id(m) in inside]


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The stack of decoder layers within a model (within its head, or beside its image encoder)."""
    while (inner := model.get_decoder()) is not model:
        model = inner  # type: ignore[assignment]
    return model
