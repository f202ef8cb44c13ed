"""Dilated attention against the paper's equations, pattern by pattern, and against one softmax with multiplicities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dense
from longspan.apply import apply
from longspan.attention import longnet
from longspan.attention.longnet import LongNet
from longspan.core.facts import facts_of
from longspan.core.method import parse
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.patterns import attend, masked_attention
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.util.errors import NotSupported, SpecError

SPECS = [("8/16/32", "1/2/4"), ("9/20/35", "1/2/7"), ("6", "1"), ("5/10/50", "1/5/6")]
each = pytest.mark.parametrize(("segments", "dilations"), SPECS)


def by_equations(q: Tensor, k: Tensor, v: Tensor, pattern: LongNet, causal: bool, detach: bool = False) -> Tensor:
    """Equations 4 to 11 for one row, without batch: for each head and pattern the segments are sparsified, attend, and are
    scattered back; the results are mixed by their softmax's denominators."""
    heads, length = q.shape[:2]
    outs, sums = [], []
    for w, r in zip(pattern._list("segments"), pattern._list("dilations"), strict=True):
        out = torch.zeros_like(q)
        total = torch.full(q.shape[:2], float("-inf"), dtype=q.dtype)
        for j in range(heads):
            for start in range(0, length, w):
                at = [t for t in range(start, min(start + w, length)) if (t - start) % r == j % r]
                kv = j // (heads // k.shape[0])
                scores = q[j, at] @ k[kv, at].mT * 0.4
                if causal:
                    scores = scores.masked_fill(~torch.ones(len(at), len(at)).tril().bool(), float("-inf"))
                out[j, at] = scores.softmax(-1) @ v[kv, at]
                total[j, at] = scores.logsumexp(-1)
        outs.append(out)
        sums.append(total)
    alpha = torch.stack(sums).softmax(0)[..., None]
    return sum((alpha.detach() if detach else alpha) * torch.stack(outs))


def tensors(length: int, heads: int = 4) -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    shapes = [(1, h, length, 8) for h in (heads, heads // 2, heads // 2, heads)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


@each
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("at_once", [2**17, 16])
def test_equations(segments: str, dilations: str, causal: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, for lengths within a segment and over several, multiples or not, in one chunk or several."""
    monkeypatch.setattr(longnet, "TOKENS_AT_ONCE", at_once)
    pattern = LongNet(segments, dilations)
    for length in (1, 7, 32, 57, 83):
        q, k, v, pull = tensors(length)
        got = attend(pattern, AttentionCall(q, k, v, 0.4), AttentionShape(4, length, 0, causal))
        wanted = by_equations(q[0], k[0], v[0], pattern, causal)[None]
        torch.testing.assert_close(got, wanted)
        ours, theirs = (torch.autograd.grad((x * pull).sum(), (q, k, v)) for x in (got, wanted))
        torch.testing.assert_close(ours, theirs)


@each
@pytest.mark.parametrize("causal", [True, False])
def test_multiplicities(segments: str, dilations: str, causal: bool) -> None:
    """The mixture is one softmax over all patterns' keys, counted as often as they come: the masked form, decoding's."""
    pattern, length = LongNet(segments, dilations), 61
    q, k, v, _ = tensors(length)
    grid = AttentionShape(4, length, 0, causal)
    torch.testing.assert_close(
        masked_attention(pattern, AttentionCall(q, k, v, 0.4), grid)[0], by_equations(q[0], k[0], v[0], pattern, causal)
    )


def test_who_asks() -> None:
    """Token 11 with w = 8, r = 4 stands at place 3: it asks on heads 3 and 7, and meets keys 11 and 15."""
    pattern, token = LongNet("4/8", "1/4"), torch.tensor([[11]])
    counts = pattern.multiplicity(token, torch.arange(16)[None], AttentionShape(8, 16, 0, False))[0, :, 0]
    for head in range(8):
        wanted = [int(8 <= t < 12) + int(head % 4 == 3 and t in (11, 15)) for t in range(16)]
        assert counts[head].tolist() == wanted


def test_weights_without_gradient() -> None:
    """As the authors' code: the same result, other gradients of queries and keys, those of values alike."""
    q, k, v, pull = tensors(57)
    made = {}
    for weights in ("exact", "detached"):
        pattern = LongNet("8/16/32", "1/2/4", weights)
        got = attend(pattern, AttentionCall(q, k, v, 0.4), AttentionShape(4, 57, 0, True))
        made[weights] = got, torch.autograd.grad((got * pull).sum(), (q, k, v))
        wanted = by_equations(q[0], k[0], v[0], pattern, True, detach=weights == "detached")[None]
        torch.testing.assert_close(made[weights][1], torch.autograd.grad((wanted * pull).sum(), (q, k, v)))
    assert torch.equal(made["exact"][0], made["detached"][0])
    assert not torch.allclose(made["exact"][1][0], made["detached"][1][0], rtol=1e-2)
    torch.testing.assert_close(made["exact"][1][2], made["detached"][1][2])


def test_paper_configuration() -> None:
    """4,267 keys a token from 32k tokens on, whatever the length, and scores that grow with the length alone."""
    facts = facts_of(dense.llama(window=64).config)
    assert LongNet().keys_seen(facts, 2**15) == LongNet().keys_seen(facts, 2**24) == 4267

    def scores(length: int) -> float:
        parts = (p for chunk in LongNet().chunks(length, 12, False) for p in chunk.parts)
        pairs = (p.pieces * (p.queries.length // p.queries.step) ** 2 * len(range(12)[p.heads]) for p in parts)
        return sum(pairs) / length / 12

    assert scores(2**18) == pytest.approx(4267, rel=0.01)
    assert scores(2**21) == pytest.approx(scores(2**18), rel=0.01)
    sizes = [chunk.end - chunk.start for chunk in LongNet().chunks(2**24, 12, True)]
    assert max(sizes) == 2**17  # what is held in float32 does not grow


def test_settings() -> None:
    pattern = parse("longnet:segments=2k/4k,dilations=1/2").methods[0]
    assert pattern.patterns == [(2048, 1), (4096, 2)]
    for spec, said in (
        ("segments=8/16", "2 segments and 5 dilations"),
        ("segments=8,dilations=2", "first dilation must be 1"),
        ("segments=8/16,dilations=1/17", "from 1 to its segment"),
        ("segments=8/x,dilations=1/2", "whole number"),
        ("segments=8//16,dilations=1/2/3", "whole number"),
    ):
        with pytest.raises(SpecError, match=said):
            parse(f"longnet:{spec}")


def test_refusals() -> None:
    with pytest.raises(NotSupported, match="weights=exact"):
        apply(dense.llama(window=64), "longnet:segments=8/16,dilations=1/2,weights=detached")
    config = LongspanConfig(
        hidden_size=64,
        num_hidden_layers=1,
        position="alibi",
        attention="longnet:segments=8,dilations=1,weights=detached",
    )
    with pytest.raises(NotSupported, match="weights=exact"):
        LongspanForCausalLM(config)
    ours = LongspanForCausalLM(LongspanConfig(hidden_size=64, num_hidden_layers=1, position="alibi"))
    with pytest.raises(NotSupported, match="built with this attention"):
        apply(ours, "longnet:segments=8,dilations=1")


def test_reach() -> None:
    facts = facts_of(dense.llama(window=64).config)
    assert LongNet("8/64", "1/2").reach(facts) is None and LongNet("8/65", "1/2").reach(facts) == 64
    assert LongNet("8", "1").neutral_length() == 8 and LongNet("8/16", "1/2").neutral_length() == 1


def test_dropout_trains() -> None:
    """Dropout acts on the weights of the joint softmax, in the masked form."""
    pattern = LongNet("8/16", "1/2")
    q, k, v, _ = tensors(40)
    grid = AttentionShape(4, 40, 0, True)
    torch.manual_seed(0)
    mean = sum(attend(pattern, AttentionCall(q, k, v, 0.4, dropout=0.3), grid).detach() for _ in range(300)) / 300
    torch.testing.assert_close(mean, attend(pattern, AttentionCall(q, k, v, 0.4), grid).detach(), atol=0.25, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [100, 256, 600])
def test_tiles_gone_through_hold_the_pairs(length: int, causal: bool) -> None:
    """Each pattern by itself, from the segments' places: tiles of 64 queries and keys among those that a head takes."""
    pattern, heads = LongNet("128/512", "1/3"), 2
    tiles = 0
    for size, step in pattern.patterns:
        for head in range(heads):
            for start in range(0, length, size):
                taken = torch.arange(min(size, length - start))
                blocks = (taken[taken % step == head % step] // step // 64).unique()
                tiles += int((blocks[:, None] >= blocks).sum()) if causal else len(blocks) ** 2
    grid = AttentionShape(heads, length, 0, causal)
    assert pattern.visited(grid, torch.device("cpu")) == 64**2 * tiles > pattern.pairs(grid)
