"""The grouped softmax against explicit loops in float64, forward and backward."""

import pytest
import torch

from longspan.engine.retrieval.grouped import QUERIES_AT_ONCE, grouped_attention, grouped_weights


def _loops(q, k, v, block, scale):
    size, groups, rows = block + 1, q.shape[1] // k.shape[1], []
    for h in range(q.shape[1]):
        for i in range(q.shape[2]):
            s = [torch.exp(scale * (q[0, h, i] * k[0, h // groups, j]).sum()) for j in range(i + 1)]
            p = i // size
            mine = [j for j in range(p * size, i + 1) if j % size != block]
            total = sum(s[j] for j in mine) + sum(s[b * size + block] for b in range(p))
            out = sum(s[j] / total * v[0, h // groups, j] for j in mine)
            for b in range(p):
                page = range(b * size, b * size + block)
                inner = sum(s[j] for j in page)
                out = out + sum(s[b * size + block] / total * s[j] / inner * v[0, h // groups, j] for j in page)
            rows.append(out)
    return torch.stack(rows).view_as(q)


@pytest.mark.parametrize(("block", "n"), [(1, 7), (3, 12), (3, 14), (5, 4)])
def test_loops_forward_and_backward(block, n):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    fast, slow = grouped_attention(q, k, v, block, 0.5), _loops(q, k, v, block, 0.5)
    torch.testing.assert_close(fast, slow)
    g = torch.randn_like(q)
    for a, b in zip(torch.autograd.grad(fast, (q, k, v), g), torch.autograd.grad(slow, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_sum_to_one_and_landmarks_and_later_tokens_weigh_nothing():
    torch.manual_seed(0)
    weights = grouped_weights(30 * torch.randn(2, 4, 30, 30), 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 30))
    assert not weights[..., 3::4].any() and not weights.triu(1).any()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_queries_a_few_at_a_time_give_what_all_at_once_give(softcap):
    """Forward and backward over several batches of queries, whose scores are not kept for the backward pass."""
    torch.manual_seed(0)
    n = 2 * QUERIES_AT_ONCE + 77
    q, k, v = (torch.randn(2, h, n, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        made = grouped_attention(q, k, v, 7, 0.5, softcap=softcap)
    assert max(kept, default=0) <= q.numel()
    scores = q @ k.repeat_interleave(2, 1).mT * 0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    whole = grouped_weights(scores, 7) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(made, whole)
    g = torch.randn_like(q)
    for a, b in zip(torch.autograd.grad(made, (q, k, v), g), torch.autograd.grad(whole, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_the_same_in_the_backward_pass():
    q, k, v = (torch.randn(1, 2, 40, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(value):
        torch.manual_seed(0)
        return grouped_attention(q, k, value, 3, 0.5, dropout=0.5)

    assert not torch.equal(run(v), grouped_attention(q, k, v, 3, 0.5))
    step = torch.randn_like(v)
    slope = torch.autograd.grad(run(v).sum(), v)[0]
    torch.testing.assert_close(
        (run(v + step) - run(v)).sum(), (slope * step).sum()
    )  # the output is linear in the values
