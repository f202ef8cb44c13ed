"""Packed rows of several texts: each text is read as a row of its own, and its states are put back where it was.

As in transformers, a position that is not the one before plus 1 begins another text, where there is no mask. Full attention in a
decoder separates texts by its mask of pairs; patterns and mixers have no such mask, and many carry a state along the row. Texts
whose lengths are within a factor of two form a batch, so that padding is less than half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """Texts of similar length.

    index (texts, longest): of their tokens among all tokens of all rows; real: False for padding.
    """

    index: Tensor
    real: Tensor

    def take(self, x: Tensor) -> Tensor:
        """x (B, T, …) → (texts, longest, …)."""
        return x.flatten(0, 1)[self.index]


def packed(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether some row of positions (B, T) holds several texts; never where there is a mask."""
    return positions is not None and mask is None and bool((positions.diff() != 1).any())


def texts_in(positions: Tensor) -> list[Texts]:
    """The texts in rows with these positions (B, T), grouped by length."""
    starts = torch.nn.functional.pad(positions.diff() != 1, (1, 0), value=True).flatten()
    begins = starts.nonzero()[:, 0]
    sizes = torch.diff(begins, append=begins.new_tensor([starts.numel()]))
    classes = (sizes - 1).clamp(min=1).log2().floor()  # 1 … 2, 3 … 4, 5 … 8 tokens, and so on
    found = []
    for one in classes.unique().tolist():
        chosen, lengths = begins[classes == one], sizes[classes == one]
        steps = torch.arange(int(lengths.max()), device=positions.device)
        real = steps < lengths[:, None]
        found.append(Texts((chosen[:, None] + steps).where(real, chosen[:, None]), real))
    return found


def put_back(parts: list[tuple[Texts, Tensor]], rows: int) -> Tensor:
    """States (texts, longest, …) of the texts, put back into `rows` rows: (B, T, …)."""
    index = torch.cat([texts.index[texts.real] for texts, _ in parts])
    states = torch.cat([out[texts.real] for texts, out in parts])
    return states[index.argsort()].unflatten(0, (rows, -1))
