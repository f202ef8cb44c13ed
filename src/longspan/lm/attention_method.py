"""The interface by which a configuration uses what `attention=` and `memory=` name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from torch import nn

from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.hf.site import Site
from longspan.positions.scheme import PositionEncoding
from longspan.util.errors import NotSupported


class AttentionMethod(Method):
    """A pattern, a mixer or a memory, as a configuration sees it; `longspan.lm.base` has the base classes."""

    seam = "attention"
    slots = frozenset({"attention", "span"})
    works_on = "from scratch"
    why_not_exportable = "a model is trained with it; longspan train makes one"
    takes_mask: ClassVar[bool] = False
    """Whether its module is called with transformers' mask (new tokens × all tokens)."""
    replaces_mlp: ClassVar[bool] = False
    """Whether it is a whole layer, which no feed-forward network follows."""
    knows_order: ClassVar[bool] = False
    """Whether it knows the order of tokens without a position scheme, also in an encoder."""
    takes_globals: ClassVar[bool] = False
    """Whether the model accepts a `global_attention_mask`."""
    directions: ClassVar[tuple[str, ...]] = ("causal", "bidirectional")
    former_defaults: ClassVar[Mapping[str, str]] = {}
    """Former defaults by setting: a saved configuration that leaves the setting out means the former default."""

    def build(self, config: Any, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        """The module of layer `layer`, from 0.

        A submodule with a method `draw_weights()` is initialised by it; the method must use `transformers.initialization`, so
        that weights of a checkpoint stay. Raises `NotSupported` for a configuration that the method cannot be in.
        """
        raise NotImplementedError

    def join(self, stack: Any) -> None:
        """Called once with a stack whose layers are all built, for what the layers share."""

    def check_direction(self, causal: bool) -> None:
        """Raises `NotSupported` for a direction that is not in `directions`; causal: a decoder."""
        direction = "causal" if causal else "bidirectional"
        if direction not in self.directions:
            kind = "an encoder (kind=encoder)" if causal else "a decoder (kind=decoder)"
            raise NotSupported(
                f"attention={self.spec} is not {direction}; use it in {kind}"
                + (", or in kind=encoder-decoder with decoder_attention=full" if causal else "")
            )

    def check(self, facts: ModelFacts) -> None:
        self._refuse(facts)

    def _refuse(self, facts: ModelFacts) -> NoReturn:
        raise NotSupported(
            f"{self.name} is trained into a model and {facts.architecture} was trained without it: train one with "
            f"longspan train (model.attention={self.name}). On trained models yarn, self-extend or streaming work"
        )

    def attach(self, site: Site) -> None:
        self._refuse(site.facts)
