"""Crossbatch (Tworkowski 2023, section 3.2): attention to one's own context and to the earlier contexts of several documents.

Row i meets, in one softmax, its own context up to the query, its own earlier context, and the earlier contexts of the rows
i + 1 … i + d - 1, counted round the batch. Gradients reach the keys and values of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from longspan.engine.core import attention, expand_heads
from longspan.engine.retrieval.memories import within
from longspan.util.errors import NotSupported


@dataclass
class Others:
    """Every row's earlier context: keys and values (B, H_kv, C, D), of which each row meets `contexts`; C is 0 where there is
    none. real (B, C): False where a row is filled up; None where none is."""

    key: Tensor
    value: Tensor
    contexts: int
    real: Tensor | None = None

    def rows(self) -> Tensor:
        """(B, contexts): whose contexts each row meets, its own first.

        Raises `NotSupported` for more than there are rows.
        """
        batch = len(self.key)
        if self.contexts > batch:
            raise NotSupported(
                f"focused:d={self.contexts} meets as many documents, and {batch} are trained on at once; use a batch of "
                f"{self.contexts} (training.micro_batch), d={batch}, or, to read a text by itself, model.eval()"
            )
        device = self.key.device
        return (torch.arange(batch, device=device)[:, None] + torch.arange(self.contexts, device=device)) % batch


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    others: Others,
    real: Tensor | None,
    scale: float,
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(B, H, T, D); query (B, H, T, D) and the local key and value (B, H_kv, T, D). real (B, T): as in `Others`. window: how many
    local keys a query sees at most."""
    rows = others.rows()
    far = [x[rows].transpose(1, 2).flatten(2, 3) for x in (others.key, others.value)]
    keys, values = (torch.cat(pair, dim=2) for pair in zip(far, (key, value), strict=True))
    near = query.shape[2]
    if others.real is None and softcap is None and (window is None or window >= near):
        keys, values = (expand_heads(x, query.shape[1]) for x in (keys, values))
        mask = causal_lower_right(near, keys.shape[2])
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale)
    far_seen = torch.ones(near, keys.shape[2] - near, dtype=torch.bool, device=query.device)
    seen = torch.cat((far_seen, within(near, near, window, query.device)), dim=1)[None]
    if others.real is not None and real is not None:
        seen = seen & torch.cat((others.real[rows].flatten(1), real), dim=1)[:, None]
    return attention(query, keys, values, seen[:, None], scale, dropout=dropout, softcap=softcap)
