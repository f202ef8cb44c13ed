"""Performer: attention by random features whose product estimates e^(q·k), in linear time (FAVOR+, Choromanski 2021).

Keys' features are divided by the largest so far in their head (`engine/linear`), and nothing is added to them. The authors' code
divides by the largest of the whole text and adds 1e-6: then the causal form depends on later tokens, and where features are below
1e-6 every token has the same weight.

On a trained model softmax is replaced by its estimate. For queries and keys of the size of trained ones the error is large
(`attention/random_features.py` measures it), so the model must be fine-tuned with the method to be of use. Its KV cache is as
before: each new token costs the features of all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longspan.attention.linear import KernelAttention, KernelMixer
from longspan.attention.random_features import Draw, RandomFeatures
from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.engine.linear.attention import Kernel, causal, read
from longspan.hf.call import LayerCall
from longspan.hf.forward import forward_of
from longspan.hf.site import Site, layer_number
from longspan.lm.base import HANDED
from longspan.lm.configuration import LongspanConfig
from longspan.lm.modeling import LongspanModel
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported


class PerformerAttention(KernelAttention):
    """Attention with random features, drawn for this layer."""

    def __init__(
        self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool, method: Performer
    ):
        super().__init__(config, layer, encoding, causal=causal)
        self.method = method
        self.features = method.random_features(self.head_dim, layer)

    def kernel(self, handed: dict[Method, Any]) -> Kernel:
        drawn: dict[int, Tensor] = handed.get(self.method, {})
        return self.features.kernel(self.scaling, drawn.get(self.layer_idx))


@dataclass(frozen=True)
class Performer(KernelMixer):
    """Attention by `features` random features, drawn from `seed` for each layer, `orthogonal` in blocks or independent. `norms`
    of their rows: those of normal vectors (chi), or all equal (sqrt, the regularised softmax kernel). `kernel`: softmax, or relu
    (the generalised kernel relu(W x) + 0.001). `redraw`: training forwards after which features are drawn again, 0 for never;
    evaluation and decoding use the last."""

    features: int = 256
    kernel: Literal["softmax", "relu"] = "softmax"
    orthogonal: bool = True
    norms: Literal["chi", "sqrt"] = "chi"
    redraw: int = 0
    seed: int = 0

    name = "performer"
    title = "Performer (FAVOR+ random features)"
    also = ("favor", "favor+")
    near = ("random-feature-attention", "rfa")
    paper = "Choromanski 2021, arXiv 2009.14794"
    works_on = "from scratch, or a trained model that is then fine-tuned"
    cost = "time n, state of one size (on a trained model: cache n, and features of all keys for each new token)"
    why_not_exportable = "it replaces softmax, and a checkpoint only holds weights and settings"

    def __post_init__(self) -> None:
        self.require(self.features >= 1, f"features must be at least 1, not {self.features}")
        self.require(self.redraw >= 0, f"redraw must be a number of steps, or 0 for never, not {self.redraw}")
        self.require(self.seed >= 0, f"seed must be 0 or above, not {self.seed}")

    def random_features(self, width: int, layer: int) -> RandomFeatures:
        """The features of layer `layer`, for heads of `width` channels."""
        draw = Draw(self.features, self.orthogonal, self.norms)
        return RandomFeatures(draw, width, self.seed, layer, kernel=self.kernel, redraw=self.redraw)

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        self.check_config(config, encoding, causal=causal)
        return PerformerAttention(config, layer, encoding, causal=causal, method=self)

    def join(self, stack: LongspanModel) -> None:
        """Counts forwards on the stack, where gradient checkpointing does not run them twice."""
        if self.redraw:
            stack.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Passes its features to each forward: when it is recomputed, others may have been drawn."""
        if not (stack.training and torch.is_grad_enabled()):
            return None
        modules = [m for m in stack.modules() if isinstance(m, PerformerAttention) and m.method == self]
        drawn = {module.layer_idx: module.features.count() for module in modules}
        return args, {**kwargs, HANDED: {**kwargs.get(HANDED, {}), self: drawn}}

    def check(self, facts: ModelFacts) -> None:
        if self.redraw:
            raise NotSupported(
                f"performer: redraw={self.redraw} is for models built with it; on a trained model features are drawn once, "
                "from the seed; leave redraw out"
            )
        windowed = facts.sliding_window is not None and not facts.layer_types
        if windowed or facts.layer_types - {"full_attention"}:
            raise NotSupported(
                f"performer sums over all tokens before a query, and {facts.architecture} has layers with a window or a "
                "recurrence; use a model with full attention in every layer"
            )

    def attach(self, site: Site) -> None:
        if any(getattr(module, "pattern", None) is not None for module in site.model.modules()):
            raise NotSupported(
                "performer sums over all tokens before a query, and this model was trained with a pattern that hides some of "
                "them; use a model with full attention, or train one with attention=performer"
            )
        trained = OnTrainedModel(self, site)
        site.attention(trained.attend, own_mask=True)
        site.before_forward(trained.before_forward)


class OnTrainedModel:
    """Attention by random features on one trained model."""

    def __init__(self, method: Performer, site: Site):
        self.method, self.site = method, site
        self.features: dict[int, RandomFeatures] = {}

    def before_forward(self, arguments: dict[str, Any]) -> None:
        """Stores which tokens of a forward are real.

        Raises `NotSupported` for masks of pairs and for packed texts.
        """
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise NotSupported(
                "performer sums over all tokens, so a mask can only hide padding; pass one of shape (batch, tokens)"
            )
        if positions is not None and positions.ndim == 3:  # Qwen-VL's; this one never goes back within a text
            positions = positions[0]
        if mask is None and positions is not None and bool((positions.diff() < 0).any()):
            raise NotSupported(
                "position_ids pack several texts into one row, and performer would sum across them; use "
                "data.packing=plain or none"
            )
        forward_of(arguments).keep(self, None if mask is None or bool(mask.all()) else mask.bool())

    def attend(self, call: LayerCall) -> Tensor:
        """Causal attention (B, H, Tq, D) of the call's queries by the features of its keys."""
        self._check(call)
        kernel = self._features(call).kernel(call.scale)
        total, before = call.key.shape[2], call.key.shape[2] - call.query.shape[2]
        real: Tensor | None = call.forward.state(self)
        if real is not None and real.shape[1] != total:
            raise NotSupported(
                f"performer: the mask has {real.shape[1]} of {total} tokens; pass one over all tokens so far"
            )
        old, new = (None, None) if real is None else (real[:, :before], real[:, before:])
        state = read(call.key[:, :, :before], call.value[:, :, :before], kernel, real=old) if before else None
        return causal(call.query, call.key[:, :, before:], call.value[:, :, before:], kernel, state, new)[0]

    def _features(self, call: LayerCall) -> RandomFeatures:

        layer = layer_number(call.module)
        if layer not in self.features:
            self.features[layer] = self.method.random_features(call.query.shape[-1], layer)
        return self.features[layer].to(call.query.device)

    def _check(self, call: LayerCall) -> None:
        if call.softcap is not None:
            raise NotSupported(
                f"performer: {self.site.facts.architecture} caps its scores, which performer does not compute; use a model "
                "without a cap"
            )
        if call.dropout:
            raise NotSupported(
                f"performer: attention dropout {call.dropout} drops weights that performer does not compute; set "
                "attention_dropout=0 in the model's configuration"
            )
