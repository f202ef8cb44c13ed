"""Several texts in one row, which do not see one another: each is read as a row of its own and put back where it was.

As transformers has it, positions that do not run on by one begin another text where no mask is given. Full attention in a decoder
keeps texts apart by its mask of pairs; patterns and mixers have none, and many carry something along the row. Texts whose
lengths are within a factor of two of one another make a batch, so that padding is less than half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """Texts of like length: `index` (texts, longest) says where their tokens stand among all tokens of all rows, `real` which
    of them are theirs."""

    index: Tensor
    real: Tensor

    def take(self, x: Tensor) -> Tensor:
        """x (B, T, …) → (texts, longest, …)."""
        return x.flatten(0, 1)[self.index]


def packed(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether some row holds several texts."""
    return positions is not None and mask is None and bool((positions.diff() != 1).any())


def texts_in(positions: Tensor) -> list[Texts]:
    """The texts of rows whose tokens have these positions (B, T)."""
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
    """What came of the texts, each (texts, longest, …), in its `rows` again: (B, T, …)."""
    index = torch.cat([texts.index[texts.real] for texts, _ in parts])
    states = torch.cat([out[texts.real] for texts, out in parts])
    return states[index.argsort()].unflatten(0, (rows, -1))
