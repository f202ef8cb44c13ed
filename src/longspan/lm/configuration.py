"""The configuration of a `longspan.lm` model: its sizes, and `position`, `attention` and `memory` as spec strings."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from longspan.core.method import parse
from longspan.hf.compat import CACHE_NAMES
from longspan.lm.attention_method import AttentionMethod
from longspan.positions.scheme import PositionEncoding, Scheme, SchemeModifier, Shape
from longspan.util.errors import NotSupported, SpecError

KINDS = ("decoder", "encoder", "encoder-decoder")
SINKS = ("none", "zero", "learned")


@strict
class LongspanConfig(PreTrainedConfig):
    """The configuration of a decoder, an encoder or an encoder-decoder, by `kind`.

    max_position_embeddings: the training length in tokens.
    position: a position scheme as a spec string (`rope`, `alibi`, `kerple:kind=power`, `t5 + logn`, …); `longspan methods` lists
    them.
    attention: `full`, a pattern or a mixer as a spec string, or a list of them that is repeated over the layers.
    decoder_attention: the same for the decoder of an encoder-decoder, where it differs from the encoder's.
    memory: what a token sees beyond attention (`transformer-xl:segment=128,length=128`), with attention=full.
    sink: an attention sink of a decoder (Xiao 2024, arXiv 2309.17453, section 3.3). `zero`: the sum of every softmax has one more
    exp(0) = 1 (softmax-off-by-one), with attention=full or a pattern. `learned`: one trained token before every text
    (`lm/sink.py`).
    reversible: two residual streams, whose activations are recomputed and not stored (`lm/reversible.py`).
    mlp_chunk: tokens in one call of a feed-forward network; None for all (`engine/chunked.py`).

    Defaults of sizes: as many key-value heads as heads, heads of hidden_size / heads channels, a feed-forward layer of
    8/3 · hidden_size rounded up to a multiple of 64, as many decoder layers as encoder layers. Raises `SpecError` and
    `NotSupported` for settings that cannot be combined.
    """

    model_type = "longspan"
    keys_to_ignore_at_inference = CACHE_NAMES
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    decoder_layers: int | None = None
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 512
    kind: str = "decoder"
    position: str = "rope"
    attention: str | list[str] = "full"
    decoder_attention: str | list[str] | None = None
    memory: str = "none"
    sink: str = "none"
    reversible: bool = False
    mlp_chunk: int | None = None
    rope_parameters: dict | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check()
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.intermediate_size = self.intermediate_size or -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.kind == "encoder-decoder":
            self.decoder_layers = self.decoder_layers or self.num_hidden_layers
        kwargs["is_encoder_decoder"] = self.kind == "encoder-decoder"
        rotation = self.scheme.rope_parameters()
        self.rope_parameters = self.rope_parameters or rotation
        super().__post_init__(**kwargs)
        if rotation is None:  # transformers has filled it in by now
            self.rope_parameters = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A saved configuration, in which settings that are left out have their former defaults (`former_defaults`)."""
        return super().from_dict({**config_dict, **_named(config_dict, former=True)}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers' `to_dict`, with every setting of `former_defaults` written out, so that `from_dict` keeps its
        value."""
        saved = super().to_dict()
        return {**saved, **_named(saved, former=False)}

    @property
    def scheme(self) -> Scheme:
        """The position scheme that `position` names. Raises `SpecError` for anything else."""
        return read_position(self.position)[0]

    def build_position_encoding(self, *, causal: bool) -> PositionEncoding:
        """The scheme's encoding for one stack, with the methods around it that `position` names (log-n); causal: the decoder's.

        Raises `NotSupported` and `SpecError` for a stack that the scheme cannot be in.
        """
        scheme, modifiers = read_position(self.position)
        encoding = scheme.build(self.shape(causal=causal))
        for modifier in modifiers:
            encoding = modifier.wrap(encoding, self.max_position_embeddings, causal=causal)
        return encoding

    @property
    def attentions(self) -> tuple[AttentionMethod, ...]:
        """The methods that `attention` or `memory` name, repeated over the layers.

        Raises `SpecError` for anything else.
        """
        return _read_attentions(self.attention) if self.memory == "none" else (self._read_memory(),)

    def attentions_of(self, *, causal: bool) -> tuple[AttentionMethod, ...]:
        """The attention methods of one stack: the decoder's (causal) or the encoder's."""
        return _read_attentions(self.decoder_attention) if causal and self.decoder_attention else self.attentions

    def _read_memory(self) -> AttentionMethod:
        methods = parse(self.memory).methods
        if len(methods) != 1 or not isinstance(methods[0], AttentionMethod) or methods[0].seam != "memory":
            raise SpecError(
                f"memory={self.memory!r} is not a memory to build a model with, such as transformer-xl:segment=128,length=128"
            )
        if self.attention != "full" or self.decoder_attention:
            other = self.decoder_attention or self.attention
            raise NotSupported(
                f"memory={self.memory} and attention={other} both define which keys are seen; leave one of them out"
            )
        return methods[0]

    def shape(self, *, causal: bool) -> Shape:
        """The shape of one stack, for which a position scheme is built; causal: the decoder's."""
        assert self.head_dim is not None
        return Shape(
            layers=max(self.num_hidden_layers, self.decoder_layers or 0),
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            head_dim=self.head_dim,
            window=self.max_position_embeddings + (self.sink == "learned"),  # the sink has a position too
            causal=causal,
            ordered=any(a.knows_order for a in self.attentions_of(causal=causal)),
        )

    def _check(self) -> None:
        if self.kind not in KINDS:
            raise SpecError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise SpecError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key-value heads evenly"
            )
        if self.sink not in SINKS:
            raise SpecError(f"sink must be one of {', '.join(SINKS)}, not {self.sink!r}")
        if self.sink != "none" and self.kind != "decoder":
            raise NotSupported(f"sink={self.sink} works in a decoder, not with kind={self.kind}; use kind=decoder")
        replaced = all(a.replaces_mlp for a in (*self.attentions, *self.attentions_of(causal=True)))
        if self.mlp_chunk is not None and (self.mlp_chunk < 1 or replaced):
            why = (
                f"with attention={self.attention} there is no feed-forward network"
                if replaced
                else "it is below 1 token"
            )
            raise SpecError(f"mlp_chunk={self.mlp_chunk}: {why}; leave it out")
        if self.decoder_attention and self.kind != "encoder-decoder":
            raise SpecError(f"decoder_attention needs kind=encoder-decoder; with kind={self.kind} use attention=")


def _named(config: dict[str, Any], *, former: bool) -> dict[str, Any]:
    """The attentions of a configuration with all settings of `former_defaults`, by their former or present defaults."""
    named: dict[str, Any] = {}
    for key in ("attention", "decoder_attention"):
        if specs := config.get(key):
            named[key] = _name(specs, former) if isinstance(specs, str) else [_name(spec, former) for spec in specs]
    return named


def _name(spec: str, former: bool) -> str:
    attention, _, settings = spec.partition(":")
    present = {setting.partition("=")[0].strip() for setting in settings.split(",")}
    method = _read_attention(spec)
    left_out = {name: before for name, before in method.former_defaults.items() if name not in present}
    if not left_out:
        return spec
    added = [f"{name}={before if former else getattr(method, name)}" for name, before in left_out.items()]
    return f"{attention}:{','.join([settings, *added] if settings else added)}"


def _read_attentions(specs: str | list[str]) -> tuple[AttentionMethod, ...]:
    specs = [specs] if isinstance(specs, str) else specs
    return tuple(_read_attention(spec) for spec in specs) or (_read_attention(""),)


def _read_attention(spec: str) -> AttentionMethod:
    methods = parse(spec).methods
    if len(methods) != 1 or not isinstance(methods[0], AttentionMethod) or methods[0].seam != "attention":
        raise SpecError(
            f"attention={spec!r} is not one pattern or mixer, such as full or window:size=256; a position scheme belongs in "
            "position=, and methods for trained models are applied to the model afterwards with longspan.apply"
        )
    return methods[0]


def read_position(spec: str) -> tuple[Scheme, list[SchemeModifier]]:
    """The scheme of a `position` setting, and the methods around it (log-n).

    Raises `SpecError` for anything else.
    """
    methods = parse(spec).methods
    schemes = [m for m in methods if isinstance(m, Scheme)]
    modifiers = [m for m in methods if isinstance(m, SchemeModifier)]
    if len(schemes) != 1 or len(schemes) + len(modifiers) != len(methods):
        raise SpecError(
            f"position={spec!r} is not one position scheme, such as rope, alibi or kerple:kind=power, alone or with "
            "logn; methods for trained models, such as yarn, are applied to the model afterwards with longspan.apply"
        )
    return schemes[0], modifiers
