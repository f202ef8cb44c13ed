"""Grouped softmax of Landmark Attention (Mohtashami & Jaggi 2023, arXiv 2305.16300, section 3.1), full form.

Blocks are dense pages of `block` tokens and one landmark, so two softmaxes and a product are enough: no scatter, and no
limit on the number of blocks.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def grouped_weights(scores: Tensor, block: int) -> Tensor:
    """Weights [..., n, n] in float32 or wider from scaled scores [..., n, n]; every row sums to 1, landmarks weigh 0.

    Place i is a landmark where i % (block + 1) == block. A token of an earlier block weighs its softmax within that
    block times its landmark's share; tokens of the query's own block share the top softmax with those landmarks.
    """
    n, size = scores.shape[-1], block + 1
    scores = pad(scores.to(torch.promote_types(scores.dtype, torch.float32)), (0, -n % size))
    paged = scores.unflatten(-1, (-1, size))
    keys = torch.arange(scores.shape[-1], device=scores.device).view(-1, size)
    query = torch.arange(n, device=scores.device)[:, None, None]
    landmark = keys % size == block
    own = keys // size == query // size
    top = (own & (keys <= query) & ~landmark) | (landmark & (keys // size < query // size))
    shares = paged.masked_fill(~top, -torch.inf).flatten(-2).softmax(-1).view_as(paged)
    within = paged.masked_fill(landmark, -torch.inf).softmax(-1)
    return torch.where(own, shares, within * shares[..., -1:]).flatten(-2)[..., :n]


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, block: int, scale: float) -> Tensor:
    """Output [b, h, n, d] in query's dtype for query [b, h, n, d], key and value [b, kv heads, n, d]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.to(wide).repeat_interleave(groups, 1) for x in (key, value))
    weights = grouped_weights(query.to(wide) @ keys.transpose(-1, -2) * scale, block)
    return (weights @ values).to(query.dtype)
