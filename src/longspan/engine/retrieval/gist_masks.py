"""Masks where gist tokens replace the tokens before them.

A text is cut behind every run of gist tokens. A token sees its own piece, and of the piece before only the gist tokens at
its end; so a second run of gist tokens sums up what the first one held and what came since. In a decoder attention is causal
besides, and so is its summary; in an encoder a piece sees itself in both directions and nothing of the pieces after it
(Mu 2023, section 3.2 and Figure 2).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Mode = Literal["gist", "positive", "negative"]


def pieces(gist: Tensor) -> Tensor:
    """The number of each token's piece, (B, T + 1) of gist (B, T) boolean; the last one is of whatever comes next."""
    ends = gist & ~F.pad(gist[:, 1:], (0, 1))
    return F.pad(ends.cumsum(1), (1, 0))


def visible(gist: Tensor, new: int, mode: Mode) -> Tensor:
    """Boolean (B, new, T): what each of the last `new` tokens sees, causality and padding aside. gist: boolean (B, T).
    negative: nothing of earlier pieces, not even their gist tokens."""
    number = pieces(gist)[:, :-1]
    return _sees(number[:, -new:], number, gist, mode)


def kept(gist: Tensor, mode: Mode) -> Tensor:
    """Boolean (B, T): what is seen by one who comes after the text, as a decoder does after its encoder."""
    number = pieces(gist)
    return _sees(number[:, -1:], number[:, :-1], gist, mode)[:, 0]


def _sees(queries: Tensor, keys: Tensor, gist: Tensor, mode: Mode) -> Tensor:
    own = keys[:, None, :] == queries[:, :, None]
    if mode == "negative":
        return own
    before = keys[:, None, :] == queries[:, :, None] - 1
    return own | before & gist[:, None, :]
