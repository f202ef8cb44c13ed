"""Blocks against their definition token by token; their fast way at every length; on trained models."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import dense
from longspan.apply import apply
from longspan.attention import local
from longspan.attention.local import Blockwise, Local, Overlap
from longspan.core.facts import facts_of
from longspan.core.method import parse
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import reference_attention
from longspan.engine.patterns import attend
from longspan.hf.site import remove
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.util.errors import NotSupported, SpecError

PATTERNS = [Local(8), Local(8, 0), Local(7, 5), Overlap(8), Overlap(6, 0), Overlap(8, 4), Local(1, 0), Overlap(2)]
each = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.spec)


def seen(pattern: Blockwise, query: int, key: int) -> bool:
    """The module's text, for one query and one key."""
    block = pattern.block
    start = query // block * block
    low, high = (start - block // 2, start + 3 * block // 2) if isinstance(pattern, Overlap) else (start, start + block)
    return low <= key < high or key < pattern.globals or query < pattern.globals


def table(pattern: Blockwise, length: int, causal: bool) -> Tensor:
    pairs = itertools.product(range(length), range(length))
    return torch.tensor([seen(pattern, q, k) and (k <= q or not causal) for q, k in pairs]).view(length, length)


@each
@pytest.mark.parametrize("causal", [True, False])
def test_every_length(pattern: Blockwise, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One softmax over local and global keys, each once; also where the text is longer than what is summed at once."""
    draw = torch.Generator().manual_seed(1)
    for length, at_once in ((1, 99), (3, 99), (8, 99), (9, 16), (12, 16), (23, 16), (31, 9), (32, 99), (33, 16)):
        monkeypatch.setattr(local, "TOKENS_AT_ONCE", at_once)
        q, k, v = (torch.randn(1, h, length, 8, generator=draw, dtype=torch.float64) for h in (4, 2, 2))
        mask = table(pattern, length, causal)
        numbers = torch.arange(length)[None]
        said = pattern.mask(numbers, numbers, AttentionShape(4, length, 0, causal))[0, 0]
        assert torch.equal(said & (mask if causal else said.new_ones(1)), mask)
        got = attend(pattern, AttentionCall(q, k, v, 0.4), AttentionShape(4, length, 0, causal))
        torch.testing.assert_close(got, reference_attention(q, k, v, mask, 0.4))


@each
def test_ranges_hold_what_is_seen(pattern: Blockwise) -> None:
    """And in a decoder no more than blocks, so that a step of decoding reads no whole cache."""
    for causal, start in itertools.product((True, False), range(0, 60, 7)):
        grid = AttentionShape(1, 60, 0, causal)
        ranges = pattern.ranges(start, start + 3, grid)
        inside = [any(low <= k < high for low, high in ranges) for k in range(60)]
        wanted = [any(seen(pattern, q, k) for q in range(start, min(start + 3, 60))) for k in range(60)]
        assert all(
            i or not w or (causal and k >= start + 3) for k, (i, w) in enumerate(zip(inside, wanted, strict=True))
        )
        if causal:
            assert sum(inside) <= 2 * pattern.block + 2 * pattern.halo + pattern.globals + 3


@each
@pytest.mark.parametrize("causal", [True, False])
def test_work_grows_with_the_length(pattern: Blockwise, causal: bool) -> None:
    def scores(length: int) -> int:
        parts = (p for chunk in pattern.chunks(length, causal) for p in chunk.parts)
        return sum(p.pieces * p.queries.length * p.keys.length for p in parts)

    assert 1.9 < scores(2**20) / scores(2**19) < 2.1


def test_refusals() -> None:
    for spec in ("local:block=0", "local:block=8,globals=9", "overlap:block=7", "overlap:block=8,globals=5"):
        with pytest.raises(SpecError, match="must be"):
            parse(spec)
    model = dense.llama(window=64)
    with pytest.raises(NotSupported, match="trained into a model"):
        apply(model, "overlap:block=8")


def test_defaults_are_the_authors() -> None:
    assert (Local().block, Local().globals, Overlap().block, Overlap().globals) == (512, 1, 128, 1)


# On trained models.


def test_reach() -> None:
    """Without global tokens no distance is longer than a block; with them they grow with the text."""
    facts = facts_of(dense.llama(window=64).config)
    assert Local(32, 0).reach(facts) is None
    assert Local(32).reach(facts) == Local(100, 0).reach(facts) == 64
    assert Local(32).keys_seen(facts, 1000) == 33 and Local(32).neutral_length() == 32


@torch.no_grad()
@pytest.mark.parametrize("on", ["local:block=8", "local:block=9,globals=3", "longnet:segments=8/16/40,dilations=1/2/5"])
def test_put_on_equals_built_with(on: str) -> None:
    """A model trained with full attention under the method is the model built with it."""
    ids = torch.randint(2, 100, (2, 90), generator=torch.Generator().manual_seed(0))
    out = []
    for attention in ("full", on):
        torch.manual_seed(2)
        settings = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LongspanConfig(**settings, num_key_value_heads=2, attention=attention, initializer_range=0.2)
        model = LongspanForCausalLM(config).eval()
        out.append(model(ids).logits)
        if attention == "full":
            apply(model, on)
            out.append(model(ids).logits)
    plain, put, built = out
    torch.testing.assert_close(put, built, rtol=1e-4, atol=1e-4)
    assert (put - plain).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", ["local:block=100", "local:block=300,globals=2", "longnet:segments=64/700,dilations=1/3"]
)
def test_padding_over_several_blocks_of_queries(spec: str) -> None:
    """Rows that are read under masks, in several gathers of keys, equal a row that is read whole."""
    model = apply(dense.llama(window=2048), spec)
    ids = dense.tokens(1, 1200)
    alone = model(ids).logits
    padded = torch.cat((torch.zeros(1, 37, dtype=torch.long), ids), 1)
    mask = (torch.arange(1237) >= 37)[None].long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 37:]
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
    remove(model)
    model.set_attn_implementation("eager")  # not taken for plain: masks of the pattern's own, on a text without padding
    torch.testing.assert_close(apply(model, spec)(ids).logits, alone, rtol=1e-4, atol=1e-4)
