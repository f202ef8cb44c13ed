"""What `attention=` and `memory=` of a configuration may name: the part of patterns and mixers that a configuration asks."""

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
    """What a configuration knows of a pattern or a mixer; `longspan.lm.base.Attention` is their base."""

    seam = "attention"
    slots = frozenset({"attention", "span"})
    works_on = "from scratch"
    why_not_exportable = "a model is trained with it; longspan train makes one"
    takes_mask: ClassVar[bool] = False
    """Whether it wants the mask of (new tokens × all tokens) that transformers makes."""
    replaces_mlp: ClassVar[bool] = False
    """Whether it is a whole layer, so that no feed-forward network follows."""
    knows_order: ClassVar[bool] = False
    """Whether it tells the order of tokens apart without a position scheme, in an encoder too."""
    takes_globals: ClassVar[bool] = False
    """Whether a call may name global tokens with `global_attention_mask`."""
    directions: ClassVar[tuple[str, ...]] = ("causal", "bidirectional")
    former_defaults: ClassVar[Mapping[str, str]] = {}
    """Settings whose default is another by now, with what it was: a saved configuration that does not name them means that."""

    def build(self, config: Any, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        """The module of layer number `layer`. Where a part of it has a `draw_weights()`, that is called in place of the usual
        drawing; it goes through `transformers.initialization`, so that what a checkpoint holds stays. Raises `NotSupported`
        for a configuration that it cannot be part of."""
        raise NotImplementedError

    def join(self, stack: Any) -> None:
        """Called once, when all layers of a stack stand: for what its layers share or do together."""

    def check_direction(self, causal: bool) -> None:
        direction = "causal" if causal else "bidirectional"
        if direction not in self.directions:
            kind = "an encoder (kind=encoder)" if causal else "a decoder (kind=decoder)"
            raise NotSupported(
                f"attention={self.spec} is not {direction}; it can be part of {kind}"
                + (", and of kind=encoder-decoder with decoder_attention=full" if causal else "")
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
