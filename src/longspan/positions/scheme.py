"""Position schemes: how positions enter the attention of a `longspan.lm` model.

A scheme is a method with settings. Its `build` returns a `PositionEncoding` for a model of a given shape, which holds the
scheme's parameters, shared by all layers. A subclass overrides those of these methods that the scheme defines:

    embed          adds positions to the token embeddings           sinusoidal, learned
    rotate_qk      queries and keys before their product            xpos, xl
    query_scale    a factor on each query                           logn
    bias           added to a score, a function of the distance     alibi, kerple, sandwich, t5
    distance_bias  `bias` in the form that the kernels compute      alibi, kerple, t5
    pair_bias      added to a score, a function of both positions   tupe
    query_scores   added to a score, of the query and the distance  xl

`defines` tells which of them a scheme has. RoPE is not among them: it runs in transformers' rotary module, so that methods that
scale a pretrained model's rotation scale these models' too. `docs/adding-a-method.md` shows a whole scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.engine.biased.bias import Bias
from longspan.hf.site import Site
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class Shape:
    """The shape of the model that a scheme is built for.

    window: the training length in tokens; causal: a decoder; ordered: some layer knows the order of tokens without a scheme.
    """

    layers: int
    hidden: int
    heads: int
    head_dim: int
    window: int
    causal: bool
    ordered: bool = False


class PositionEncoding(nn.Module):
    """A scheme in one model.

    Shapes: positions (B or 1, T), integers; query (B, H, Tq, D); key (B, H_kv, Tk, D).
    """

    score_scale: float = 1.0
    """A factor on scores besides 1 / sqrt(D)."""
    reach: int | None = None
    """The number of positions of a table; None where any position works."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings x (B, T, hidden) with their positions."""
        return x

    def rotate_qk(self, query: Tensor, key: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key as their product is computed.

        The KV cache keeps keys as they were before.
        """
        return query, key

    def query_blocks(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Consecutive blocks (start, end) of queries at `positions`, small enough that `rotate_qk` of each is finite in `dtype`.

        One block, unless a scheme's factors grow with the distance.
        """
        return [(0, positions.shape[1])]

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """A factor for each query, (B or 1, T), or None."""
        return None

    def bias(self, distance: Tensor) -> Tensor:
        """What is added to scores at `distance` = query's position - key's, integers of any shape: (H, *shape), float32."""
        raise NotImplementedError

    def distance_bias(self, past: int, ahead: int, device: torch.device) -> Bias:
        """`bias` for the engine's kernels, at distances from -ahead to past: a table of it, where a subclass has no formula."""
        return Bias("table", self.bias(torch.arange(-ahead, past + 1, device=device)), offset=ahead)

    def pair_bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """What is added to the score of each pair, (B or 1, H, Tq, Tk), float32; computed once for all layers."""
        raise NotImplementedError

    def query_scores(self, query: Tensor, distance: Tensor, layer: int) -> Tensor:
        """What is added to the product of each query with a key at `distance` (N,), before the scale: (B, H, Tq, N), float32.

        query (B, H, Tq, D) is as before `rotate_qk`.
        """
        raise NotImplementedError

    def defines(self, what: str) -> bool:
        """Whether the scheme overrides the method named `what`."""
        return getattr(type(self), what) is not getattr(PositionEncoding, what)

    @property
    def plain(self) -> bool:
        """Whether the scheme changes nothing within attention, so that any implementation can run it."""
        return self.score_scale == 1.0 and not any(
            map(self.defines, ("rotate_qk", "query_scale", "bias", "pair_bias", "query_scores"))
        )

    def reset_parameters(self) -> None:
        """Draws the scheme's parameters; called whenever a model is built without weights."""


@dataclass(frozen=True)
class Scheme(Method):
    """Base of all schemes.

    A model is trained with its scheme, so a scheme cannot be applied to a trained model.
    """

    slots = frozenset({"position"})
    works_on = "from scratch"
    cost = "time n², cache n"
    why_not_exportable = "a model is trained with its positions; longspan train makes one"

    read_with: ClassVar[str] = ""
    """The method that the scheme's paper puts on a trained model to read texts longer than its window; none if empty."""

    def build(self, shape: Shape) -> PositionEncoding:
        """The scheme's encoding for a model. Raises `SpecError` for a model that cannot have it."""
        return PositionEncoding()

    def rope_parameters(self) -> dict[str, Any] | None:
        """The `rope_parameters` of transformers' rotary module, for schemes that use it; else None."""
        return None

    def check(self, facts: ModelFacts) -> None:
        self._refuse(facts)

    def _refuse(self, facts: ModelFacts) -> NoReturn:
        if self.name in facts.schemes:
            raise NotSupported(f"{facts.architecture} was trained with {self.name} and has it already; use none")
        raise NotSupported(
            f"{self.name} is trained into a model and {facts.architecture} was trained without it: train one with "
            f"longspan train (model.position={self.name}). On trained models yarn, self-extend or streaming work"
        )

    def attach(self, site: Site) -> None:
        self._refuse(site.facts)


@dataclass(frozen=True)
class SchemeModifier(Method):
    """Base of methods that a model can be trained with beside its scheme: `position="rope + logn"`."""

    def wrap(self, encoding: PositionEncoding, window: int, *, causal: bool) -> PositionEncoding:
        """The scheme's `encoding` with the method around it, in a model of `window` tokens.

        Raises `NotSupported` for a direction that the method is not for.
        """
        raise NotImplementedError
