"""Runs a per-token function, such as a feed-forward network, on chunks of tokens.

The inner activations of a feed-forward network, several times as wide as the model, are then as long as a chunk and not as
long as the text, in the backward pass too, where each chunk is computed again (Reformer, section 3; Blockwise Parallel
Transformer). The result is that of all tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(fn: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """fn(x) with `size` tokens at once, over all rows together.

    x (..., T, width); fn takes and returns (..., any number of tokens, width), each token's result by itself, with whatever
    dropout it has. The last chunk may be shorter. Random numbers in the second run are those of the first.
    """
    rows = x.shape[:-2].numel()
    chunks = x.split(max(1, size // rows), dim=-2)
    if len(chunks) == 1:
        return fn(x)
    if not torch.is_grad_enabled():
        return torch.cat([fn(c) for c in chunks], dim=-2)
    return torch.cat([checkpoint(fn, c, use_reentrant=False) for c in chunks], dim=-2)
