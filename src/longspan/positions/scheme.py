"""A position scheme: how a token's place enters attention, as one object that a model of our own is built with.

A scheme is a method with settings; `build` makes its `PositionEncoding` for a model of a given shape. A place holds the scheme's
parameters, shared by all layers, and answers a few questions, each of which most schemes leave as they are:

    embed       what is added to the token embeddings           sinusoidal, learned
    turn        queries and keys before their product            xpos
    query_scale a factor on each query                           log-n
    bias        added to a score, by the distance alone          alibi, kerple, sandwich, t5
    pair_bias   added to a score, by both places                 tupe
    query_scores  added to a score, by the query and the distance  xl

Rotation by RoPE is not among them: it runs through transformers' rotary module, so that whatever scales a pretrained
model's rotation scales ours. `docs/adding-a-method.md` shows a whole scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from longspan.core.facts import ModelFacts
from longspan.core.method import Method
from longspan.engine.biased.bias import Bias
from longspan.hf.site import Site
from longspan.util.errors import NotSupported


@dataclass(frozen=True)
class Shape:
    """The model that a scheme is built for; `window` is the training length in tokens, `ordered` says that some layer of it
    tells the order of tokens without a scheme."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    window: int
    causal: bool
    ordered: bool = False


class PositionEncoding(nn.Module):
    """A scheme in one model. Shapes: positions (B or 1, T), whole numbers; query (B, H, Tq, D), key (B, H_kv, Tk, D)."""

    score_scale: float = 1.0
    """On top of 1 / sqrt(D)."""
    reach: int | None = None
    """The number of positions that there are; None where any whole number will do."""

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings (B, T, hidden) with their places."""
        return x

    def rotate_qk(self, query: Tensor, key: Tensor, q_positions: Tensor, k_positions: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key as they meet. Keys stay in the cache as they were before."""
        return query, key

    def query_blocks(self, positions: Tensor, dtype: torch.dtype) -> list[tuple[int, int]]:
        """Consecutive blocks of queries, (start, end), such that one call of `rotate_qk` for each stays within `dtype`.

        positions (B or 1, T) are the queries'. One block, unless a scheme's factors grow with the distance.
        """
        return [(0, positions.shape[1])]

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """A factor for each query, (B or 1, T), or None."""
        return None

    def bias(self, distance: Tensor) -> Tensor:
        """What a score gets at `distance` = query's position - key's, whole numbers of any shape: (H, *shape), float32."""
        raise NotImplementedError

    def distance_bias(self, past: int, ahead: int, device: torch.device) -> Bias:
        """`bias` as the engine's kernels take it, for distances from -ahead to past: a table of it, where no formula is said."""
        return Bias("table", self.bias(torch.arange(-ahead, past + 1, device=device)), offset=ahead)

    def pair_bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """What the score of each pair gets, (B or 1, H, Tq, Tk), float32; computed once for all layers."""
        raise NotImplementedError

    def query_scores(self, query: Tensor, distance: Tensor, layer: int) -> Tensor:
        """What each query gets besides its product with a key that lies `distance` (N,) behind: (B, H, Tq, N), float32, before
        the scale; query (B, H, Tq, D) as it was before `rotate_qk`."""
        raise NotImplementedError

    def defines(self, what: str) -> bool:
        """Whether the scheme has an answer of its own to `what`."""
        return getattr(type(self), what) is not getattr(PositionEncoding, what)

    @property
    def plain(self) -> bool:
        """Whether attention is what it would be without the scheme, so that any implementation can run it."""
        return self.score_scale == 1.0 and not any(
            map(self.defines, ("rotate_qk", "query_scale", "bias", "pair_bias", "query_scores"))
        )

    def reset_parameters(self) -> None:
        """Draws the scheme's parameters anew; called whenever a model is made without weights."""


@dataclass(frozen=True)
class Scheme(Method):
    """Base of all schemes. A model is trained with its scheme, so none can be put on one afterwards."""

    slots = frozenset({"position"})
    works_on = "from scratch"
    cost = "time n², cache n"
    why_not_exportable = "a model is trained with its positions; longspan train makes one"

    def build(self, shape: Shape) -> PositionEncoding:
        """The scheme's part of a model. Raises `NotSupported` for a model that cannot have it."""
        return PositionEncoding()

    def rope_parameters(self) -> dict[str, Any] | None:
        """What transformers' rotary module is built from, for schemes that rotate; None for the others."""
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
