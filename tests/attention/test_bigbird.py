"""BigBird: its blocks by an independent builder, the same as transformers' under the same plan, lengths of rows, growth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, BigBirdConfig, BigBirdModel

import checks
import tiny
from growth import growth
from longspan.attention.bigbird import BigBird
from longspan.engine.blocks import gathered as blocks
from longspan.engine.call import AttentionCall, AttentionShape
from longspan.engine.core import reference_attention
from longspan.engine.patterns import attend
from longspan.lm import LongspanConfig, LongspanForCausalLM, LongspanForConditionalGeneration, LongspanForMaskedLM
from longspan.util.errors import NotSupported, SpecError

SIZES = {**checks.SIZES, "hidden_size": 32, "intermediate_size": 48}


def config(spec: str, **settings: Any) -> LongspanConfig:
    return LongspanConfig(**{**SIZES, "attention": spec, "kind": "encoder", "position": "alibi", **settings})


def adjacency(pattern: BigBird, count: int, heads: int, layer: int) -> list[list[set[int]]]:
    """The documented rule, block by block: which blocks each block of each head sees."""
    raw = iter(np.random.PCG64([pattern.seed, layer]).random_raw(count * heads * pattern.random).tolist())
    bound = count if pattern.among is None else min(count, pattern.among // pattern.block)
    table: list[list[set[int]]] = [[set() for _ in range(count)] for _ in range(heads)]
    for i in range(count):
        for h in range(heads):
            seen = {j for j in (i - 1, i, i + 1) if 0 <= j < count}
            if not pattern.globals:
                seen |= {0, count - 1}
            for _ in range(pattern.random):
                number, left = next(raw), [j for j in range(bound) if j not in seen]
                if left:
                    seen.add(left[number % len(left)])
            whole = not pattern.globals and i in (0, count - 1)
            table[h][i] = set(range(count)) if whole else seen
    return table


def mask_of(pattern: BigBird, length: int, total: int, heads: int, layer: int = 0) -> Tensor:
    """(H, total, total), for a text of `length` tokens in a row of `total`."""
    mask, start, size = torch.zeros(heads, total, total, dtype=torch.bool), pattern.globals, pattern.block
    table = adjacency(pattern, max(0, -(-(length - start) // size)), heads, layer)
    for h in range(heads):
        for q in range(length):
            for k in range(length):
                early = q < start or k < start
                mask[h, q, k] = early or (k - start) // size in table[h][(q - start) // size]
    return mask


SPECS = [
    BigBird(block=4, random=2),
    BigBird(block=3, random=1, seed=9, among=14),
    BigBird(block=64, random=3),
    BigBird(block=5, random=0),
    BigBird(block=4, random=2, globals=6),
    BigBird(block=6, random=0, globals=1),
    BigBird(block=6, random=0, globals=60),
]


@pytest.mark.parametrize("pattern", SPECS, ids=lambda p: p.spec)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("biased", [False, True])
def test_blocks_and_rows_of_their_own_length(
    pattern: BigBird, side: str, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against softmax under a mask made by other code; each row as if it were alone, forward and backward in float64."""
    monkeypatch.setattr(blocks, "ENTRIES_AT_ONCE", 5000)  # several calls of SDPA
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, h, 45, 8, generator=draw).double().requires_grad_() for h in (4, 2, 2))
    lengths, slope = (45, 38, 7), torch.tensor([0.5, 0.2, 0.1, 0.05])
    padding = torch.stack([torch.arange(45) < n for n in lengths])
    if side == "left":
        padding = padding.flip(1)
    rows = []
    for row, length in enumerate(lengths):
        own = [x[row : row + 1, :, padding[row]] for x in (q, k, v)]
        mask = mask_of(pattern, length, length, 4, layer=3)[None]
        if biased:
            groups = [x.repeat_interleave(2, dim=1) for x in own[1:]]
            far = (torch.arange(length)[:, None] - torch.arange(length)).abs()
            scores = own[0] @ groups[0].mT * 0.4 - slope.double()[:, None, None] * far
            rows.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ groups[1])
        else:
            rows.append(reference_attention(*own, mask, 0.4))
    wanted = torch.cat([x[0].transpose(0, 1) for x in rows])
    bias = (lambda d: -slope.view(-1, *[1] * d.ndim) * d.abs()) if biased else None
    grid = AttentionShape(4, 45, 3, False, torch.tensor(lengths))
    got = attend(pattern, AttentionCall(q, k, v, 0.4, padding, bias), grid).transpose(1, 2)[padding]
    close = {"rtol": 1e-4, "atol": 1e-5} if biased else {}  # biases are float32
    torch.testing.assert_close(got, wanted, **close)
    pull = torch.randn(got.shape, generator=draw).double()
    ours = torch.autograd.grad((got * pull).sum(), (q, k, v))
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * pull).sum(), (q, k, v)), **close)


def test_what_is_drawn() -> None:
    """As many blocks as are asked for, none that is seen anyway, others for each head, layer and seed, from where they may."""
    pattern = BigBird(block=2, random=3, seed=4)
    tables = {}
    for layer in (0, 1):
        table, counts = pattern._tables(AttentionShape(4, 59, layer, False), torch.device("cpu"))
        assert counts.tolist() == [30]
        for h in range(4):
            for i in range(1, 29):
                named = [j for j in table[0, h, i].tolist() if j >= 0]
                assert len(named) == len(set(named)) == (8 if 1 < i < 28 else 7)
                assert {0, i - 1, i, i + 1, 29} <= set(named)
            tables[layer, h] = table[0, h].flatten().tolist()
    assert len({tuple(t) for t in tables.values()}) == 8
    table = BigBird(block=2, random=3, seed=5)._tables(AttentionShape(4, 59, 0, False), torch.device("cpu"))[0]
    assert table[0, 0].flatten().tolist() != tables[0, 0]
    early = BigBird(block=2, random=3, among=20)._tables(AttentionShape(4, 59, 0, False), torch.device("cpu"))[0]
    for i in range(12, 28):
        assert max(j for j in early[0, 2, i].tolist() if j < i - 1) < 10


def test_the_draws_never_change() -> None:
    """A saved model has its blocks by these numbers."""
    table = BigBird(block=1, random=2, seed=7)._tables(AttentionShape(1, 12, 1, False), torch.device("cpu"))[0]
    drawn = [sorted(set(row) - {-1, 0, 11, i - 1, i, i + 1}) for i, row in enumerate(table[0, 0].tolist())]
    assert drawn[2:10] == [[4, 9], [5, 9], [1, 6], [7, 9], [3, 4], [3, 9], [1, 5], [3, 5]]


@pytest.mark.parametrize("length", [3, 20, 27, 28])
def test_few_blocks_are_full_attention(length: int) -> None:
    torch.manual_seed(0)
    model = LongspanForMaskedLM(config("bigbird:block=4")).eval()
    full = LongspanForMaskedLM(config("full")).eval()
    full.load_state_dict(model.state_dict())
    ids = torch.randint(2, 100, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :length]).logits, full(ids[:, :length]).logits)
        assert not torch.allclose(model(ids).logits, full(ids).logits)


class Planned(BigBird):
    """With the random blocks of a plan (H, blocks - 2, drawn) of transformers, what is drawn twice counting twice."""

    plan: Any

    def _tables(self, grid: AttentionShape, device: torch.device) -> tuple[Tensor, Tensor]:
        count = grid.length // self.block
        table = torch.full((1, grid.heads, count, 5 + self.plan.shape[2]), -1)
        for i in range(1, count - 1):
            near = sorted({0, i - 1, i, i + 1, count - 1})
            table[0, :, i, : len(near)] = torch.tensor(near)
            table[0, :, i, 5:] = torch.from_numpy(self.plan[:, i - 1])
        return table, torch.tensor([count])


def plan_of(theirs: nn.Module, length: int) -> np.ndarray:
    """What their attention draws, by its own functions in the order in which it calls them."""
    size, drawn, heads = theirs.block_size, theirs.num_random_blocks, theirs.num_attention_heads
    np.random.seed(theirs.seed)
    if length in (1024, 3072, 4096):
        longest = theirs.max_seqlen
        rows = [
            theirs._bigbird_block_rand_mask(longest, longest, size, size, drawn, last_idx=1024) for _ in range(heads)
        ]
        return np.stack(rows)[:, : length // size - 2]
    lengths, numbers = theirs._get_rand_attn_plan(length, size, drawn)
    return np.stack(
        theirs._bigbird_block_rand_mask_with_head(
            from_seq_length=length,
            to_seq_length=length,
            from_block_size=size,
            to_block_size=size,
            num_heads=heads,
            plan_from_length=lengths,
            plan_num_rand_blocks=numbers,
        )
    )


@pytest.mark.parametrize(("length", "block", "drawn"), [(56, 4, 2), (64, 4, 3), (100, 5, 1), (1024, 64, 3)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_transformers(length: int, block: int, drawn: int, training: bool, padded: bool) -> None:
    """Every attention of a whole encoder of transformers, on what it was given there, forward and backward."""
    torch.manual_seed(4)
    theirs = BigBirdModel(
        BigBirdConfig(
            **tiny.sizes(100, 16, 24, 2, 2),
            max_position_embeddings=4096,
            block_size=block,
            num_random_blocks=drawn,
            attention_type="block_sparse",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).train(training)
    for name, parameter in theirs.named_parameters():
        if "attention" in name:
            nn.init.normal_(parameter, 0, 0.3)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in theirs.encoder.layer:
        layer.attention.self.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, length - 3 * block + 2 :] = 0
    theirs(ids, attention_mask=mask)
    for layer, (given, wanted) in zip(theirs.encoder.layer, seen, strict=True):
        attention = layer.attention.self
        pattern = Planned(block=block, random=drawn)
        object.__setattr__(pattern, "plan", plan_of(attention, length))
        assert not training or len({tuple(r) for r in pattern.plan[0].tolist()}) > 1
        x = given.detach().requires_grad_()
        q, k, v = (
            p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (attention.query, attention.key, attention.value)
        )
        call = AttentionCall(q, k, v, 8**-0.5, mask.bool() if padded else None)
        got = attend(pattern, call, AttentionShape(2, length, 0, False)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(got * mask[..., None], wanted * mask[..., None], rtol=1e-5, atol=1e-5)
        pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(6)) * mask[..., None]
        weights = tuple(attention.parameters())
        ours = torch.autograd.grad((got * pull).sum(), (x, *weights))
        grads = torch.autograd.grad((wanted * pull).sum(), (given, *weights))
        torch.testing.assert_close(ours, grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["bigbird:block=16,random=2", "bigbird:block=16,globals=8,random=0"])
@pytest.mark.parametrize("position", ["sinusoidal", "alibi"])
def test_growth_is_linear(spec: str, position: str) -> None:
    torch.manual_seed(0)
    module = LongspanForMaskedLM(config(spec, position=position)).model.layers[0].self_attn

    def run(length: int) -> None:
        x = torch.zeros(1, length, 32, requires_grad=True)
        module(x, position_ids=torch.arange(length)[None])[0].sum().backward()

    total, largest = growth(run, 4096)
    assert total < 2.2
    assert largest < 2.2


def test_saved_with_its_blocks_and_alike_in_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LongspanForMaskedLM(config("bigbird:block=2,random=1,seed=3")).eval()
    ids = torch.randint(2, 100, (1, 60), generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    other = LongspanForMaskedLM(config("bigbird:block=2,random=1,seed=4"))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(again.eval()(ids).logits, logits)
        assert torch.equal(again.train()(ids).logits, logits)
        assert not torch.allclose(other(ids).logits, logits)


def test_reads_for_a_decoder() -> None:
    torch.manual_seed(0)
    settings = {"kind": "encoder-decoder", "position": "alibi"}
    model = LongspanForConditionalGeneration(config("bigbird:block=2,random=1", decoder_attention="full", **settings))
    ids = torch.randint(2, 100, (2, 41), generator=torch.Generator().manual_seed(2))
    assert model.generate(ids, max_new_tokens=4).shape[0] == 2
    with pytest.raises(NotSupported, match="decoder_attention=full"):
        LongspanForConditionalGeneration(config("bigbird", **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "at least 1"),
        ({"random": -1}, "0 or more"),
        ({"globals": -1}, "0 or more"),
        ({"among": 10}, "less than a block of 64"),
        ({"random": 0, "seed": 1}, "have no effect"),
        ({"random": 0, "among": 1024}, "have no effect"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        BigBird(**settings)


def test_no_decoder() -> None:
    with pytest.raises(NotSupported, match="not causal"):
        LongspanForCausalLM(config("bigbird", kind="decoder"))
