"""A bias by distance as data, which `longspan.engine.biased.attention` adds to scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.util.errors import SpecError


@dataclass(frozen=True, eq=False)
class Bias:
    """What is added to score (h, d) after the scale.

    linear: -a[h] |d|. log: -a[h] log(1 + b[h] |d|). power: -a[h] |d|^b[h]. table: a[h, clamp(d + offset, 0, size - 1)].
    a is (H,), for a table (H, size); b is (H,). With `far`, distances past ±far count as ±far. A gradient reaches whichever
    of a and b asks for one; that of a table is cheap where few distances lie between its ends."""

    kind: Literal["none", "linear", "log", "power", "table"] = "none"
    a: Tensor | None = None
    b: Tensor | None = None
    far: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        needed = {"none": (0, 0), "linear": (1, 0), "log": (1, 1), "power": (1, 1), "table": (2, 0)}
        if self.kind not in needed:
            raise SpecError(f"a bias is none, linear, log, power or table, not {self.kind!r}")
        for name, tensor, dims in zip("ab", (self.a, self.b), needed[self.kind], strict=True):
            if (0 if tensor is None else tensor.dim()) != dims:
                shape = "(heads, size)" if dims == 2 else "(heads,)"
                raise SpecError(f"bias {self.kind}: {name} must be {f'a tensor {shape}' if dims else 'left out'}")
        if self.kind != "table" and (self.far is not None or self.offset):
            raise SpecError(f"bias {self.kind}: far and offset belong to a table")
        if self.kind == "table" and not 0 <= self.offset < self.a.shape[1]:  # type: ignore[union-attr]
            raise SpecError(f"bias table: offset {self.offset} must be an index of its {self.a.shape[1]} entries")  # type: ignore[union-attr]
        if self.far is not None and self.far < 1:
            raise SpecError(f"bias table: far must be at least 1, not {self.far}")

    def clipped(self) -> Bias:
        """The same bias with `far` carried out: a table that ends there."""
        if self.far is None or self.a is None:
            return self
        low, high = max(0, self.offset - self.far), min(self.a.shape[1], self.offset + self.far + 1)
        return replace(self, a=self.a[:, low:high], far=None, offset=self.offset - low)

    def values(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias at integer distances of any shape: (H, *shape)."""
        if self.kind == "none" or self.a is None:
            return torch.zeros((), dtype=dtype, device=distance.device)
        if self.kind == "table":
            table = self.clipped()
            a = table.a.to(dtype)  # type: ignore[union-attr]
            found = (distance + table.offset).clamp(0, a.shape[1] - 1)
            return F.embedding(found, a.T).movedim(-1, 0)  # the gradient of an index adds one by one on a GPU
        far = distance.abs().to(dtype)
        a = self.a.to(dtype).view(-1, *(1 for _ in distance.shape))
        if self.b is None:
            return -a * far
        b = self.b.to(dtype).view(a.shape)
        if self.kind == "log":
            return -a * torch.log1p(b * far)
        return -a * torch.where(far == 0, (b == 0).to(dtype), far.clamp(min=1) ** b)


def bias_rows(bias: Callable[[Tensor], Tensor], queries: range, keys: range, device: torch.device) -> Tensor:
    """(…, queries, keys) of `bias` at distances of neighbouring tokens; each distance is asked for once.

    bias: distances (N,) to (…, N). queries and keys are token numbers without gaps. Rows are views of one line, so what a
    parameter of the bias receives is summed by distance first."""
    low, high = queries.start - keys.stop + 1, queries.stop - keys.start
    return bias(torch.arange(low, high, device=device)).unfold(-1, len(keys), 1).flip(-1)
