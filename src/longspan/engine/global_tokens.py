"""Attention of the global tokens of a pattern, which see every token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.engine.call import AttentionCall
from longspan.engine.core import attention


@dataclass(frozen=True)
class Chosen:
    """Some tokens of each row: `index` (B, G) their numbers, `real` (B, G) False where a row has fewer than the most."""

    index: Tensor
    real: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Their entries of x (B, T, …), as (B, G, …)."""
        index = self.index.view(*self.index.shape, *[1] * (x.ndim - 2))
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """x (B, T, …) with `rows` (B, G, …) in their places."""
        row = torch.arange(len(x), device=x.device)[:, None].expand_as(self.index)
        return x.index_put((row[self.real], self.index[self.real]), rows[self.real])


def chosen(tokens: Tensor) -> Chosen:
    """The tokens that are True in `tokens` (B, T), in order."""
    count = tokens.sum(1)
    most = int(count.max())
    index = (~tokens).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return Chosen(index, torch.arange(most, device=tokens.device)[None] < count[:, None])


def attend_everywhere(call: AttentionCall, numbers: Tensor) -> Tensor:
    """(B, H, G, D) for the call's queries (B, H, G, D), tokens number `numbers` (B, G), on all of its keys."""
    mask = None if call.padding is None else call.padding[:, None, None]
    query, key, value = call.query, call.key, call.value
    if call.bias is not None:
        bias = call.bias(numbers[..., None] - torch.arange(key.shape[2], device=key.device)).transpose(0, 1)
        mask = bias if mask is None else bias.masked_fill(~(mask | ~mask.any(-1, keepdim=True)), float("-inf"))
        query, key, value = query.float(), key.float(), value.float()
    return attention(query, key, value, mask, call.scale, dropout=call.dropout).to(call.query.dtype)
