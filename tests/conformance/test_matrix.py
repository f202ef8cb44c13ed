"""Every method on every family: right in all the ways a model is driven, or refused with a way out, never wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from matrix import LINES, Line, documented, filled
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from longspan.apply import apply
from longspan.core.method import NoMethod, catalogue, parse
from longspan.hf.site import remove
from longspan.util.errors import LongspanError, NotSupported

LENGTH = 40
CUTS = (1, 1, 3, 9, 1, 1, 2, 1, 13, 1, 1, 1, 1, 4)
"""Sizes of the pieces in which a sequence is fed: single tokens and chunks, within the windows and far over them."""
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
"""Logits are about 1.5 wide; a key seen wrongly moves them by 1e-2 and more."""
FEW = ("llama", "mistral-sliding", "gemma2", "gemma3_text", "gpt_neox")
"""Families that differ in what a cache or an attention function must do."""
LIKE_ANOTHER = ("rerope", "leaky-rerope", "bca")
"""Methods that share all but a formula with `self-extend` or `window`: read in pieces on few families only."""


def cells(
    *, families_in: Iterable[str] = families.FAMILIES, kinds: bool = True, refused: bool = False, saved: bool = False
) -> Any:
    """Parameters `family` and `line` of the cells that run. kinds: of the static methods, which are to transformers the same
    with other numbers, the one that it has a name for and the one that travels as factors; of methods like another, the
    few families. saved: static methods on every family, since a checkpoint holds them, the others on few."""
    return pytest.mark.parametrize(
        ("family", "line"),
        [
            pytest.param(family, line, id=f"{family}-{line.name}")
            for family in families_in
            for line in LINES
            if (refused or documented(family, line) == "runs")
            and (not kinds or not line.static or line.name.startswith(("yarn-factor-2", "longrope")))
            and (not kinds or family in FEW or not line.name.startswith(LIKE_ANOTHER))
            and (not saved or line.static or family in FEW)
        ],
    )


class Cell:
    """One model, and a method for it."""

    def __init__(self, family: str, line: Line, folder: Path):
        self.line, self.family, self.model = line, family, families.build(family)
        self.spec, self.neutral = (filled(spec, self.model, folder) for spec in (line.spec, line.neutral))
        self.ids = families.tokens(2, LENGTH)


@pytest.fixture
def plain(family: str, line: Line, tmp_path: Path) -> Cell:
    return Cell(family, line, tmp_path)


@pytest.fixture
def cell(plain: Cell) -> Cell:
    """The cell with its method on the model."""
    apply(plain.model, plain.spec)
    return plain


def logits(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **arguments).logits


def in_pieces(model: PreTrainedModel, ids: Tensor, cuts: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, fed piece by piece into one cache."""
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for size in cuts:
        part, extra = slice(start, start + size), {}
        if mask is not None:
            extra = {"attention_mask": mask[:, : start + size], "position_ids": places(mask)[:, part]}
        parts.append(logits(model, ids[:, part], past_key_values=cache, use_cache=True, **extra))
        start += size
    return torch.cat(parts, dim=1)


def places(mask: Tensor) -> Tensor:
    """Positions as `generate` gives them to left-padded rows."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, mask) of rows of different length, filled up on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((row.new_zeros(longest - len(row)), row)) for row in rows])
    mask = torch.stack([torch.cat((row.new_zeros(longest - len(row)), torch.ones_like(row))) for row in rows])
    return ids, mask


def test_every_method_has_a_line() -> None:
    tried = {part.strip().partition(":")[0] for line in LINES for part in line.spec.split("+")}
    known = ((name, cls) for name, cls in catalogue().items() if NoMethod.works_on in cls.works_on)
    ours = {name for name, cls in known if cls.__module__.startswith("longspan.")}
    missing = ours - {"none"} - tried
    assert not missing, f"{missing} need `examples`: two specs, the first for a change and the second for none"
    assert tried <= ours


@cells(kinds=False, refused=True)
def test_runs_or_is_refused(plain: Cell, family: str) -> None:
    """As the table in docs says; neutral settings change nothing, others do, and nothing of either stays."""
    model, config = plain.model, plain.model.config.to_dict()
    implementation, within = model.config._attn_implementation, plain.ids[:, : families.WINDOW]
    stock, short = logits(model, plain.ids), logits(model, within)
    if documented(family, plain.line) == "runs":
        apply(model, plain.neutral)
        torch.testing.assert_close(logits(model, within), short, rtol=1e-5, atol=1e-5)
        apply(model, plain.spec)
        assert (logits(model, plain.ids) - stock)[:, -1].abs().max() > 1e-2, "the method changes nothing"
        remove(model)
    else:
        with pytest.raises(NotSupported) as refused:
            apply(model, plain.spec)
        said = str(refused.value).split(maxsplit=1)[1]
        assert re.search(rf"\b(use a model|{'|'.join(catalogue())})\b", said), f"no way out is named: {refused.value}"
    assert torch.equal(logits(model, plain.ids), stock)
    assert model.config.to_dict() == config and model.config._attn_implementation == implementation


@cells()
def test_pieces_equal_one_forward(cell: Cell) -> None:
    whole = logits(cell.model, cell.ids, use_cache=False)
    torch.testing.assert_close(in_pieces(cell.model, cell.ids, CUTS), whole, **CLOSE)
    torch.testing.assert_close(logits(cell.model, cell.ids), whole, **CLOSE)


@cells()
def test_left_padded_rows_equal_rows_alone(cell: Cell) -> None:
    short = cell.ids[0, : LENGTH - 7]
    ids, mask = padded([short, cell.ids[1]])
    alone = logits(cell.model, short[None])[0], logits(cell.model, cell.ids[1:])[0]
    for got in (
        logits(cell.model, ids, attention_mask=mask, position_ids=places(mask), use_cache=False),
        in_pieces(cell.model, ids, (9, 1, 1, 5, 1, 14, 1, 1, 7), mask),
    ):
        torch.testing.assert_close(got[0, 7:], alone[0], **CLOSE)
        torch.testing.assert_close(got[1], alone[1], **CLOSE)


@cells(families_in=FEW)
def test_gradients(cell: Cell) -> None:
    """Finite, the same with and without activation checkpointing, with padding, whether or not a cache is asked for."""
    model = cell.model.train()
    ids, mask = padded([cell.ids[0, :33], cell.ids[1]])

    def gradients(**arguments: Any) -> list[Tensor]:
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=mask, position_ids=places(mask), labels=ids, **arguments)
        out.loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    without = gradients(use_cache=False)
    assert len(without) > 10 and all(g.isfinite().all() and g.abs().max() > 0 for g in without)
    for first, second in zip(without, gradients(use_cache=True), strict=True):
        torch.testing.assert_close(first, second, **CLOSE)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    for arguments in ({"use_cache": False}, {}):
        for first, second in zip(without, gradients(**arguments), strict=True):
            torch.testing.assert_close(first, second, **CLOSE)


@cells(kinds=False, saved=True)
def test_saved_and_loaded(cell: Cell, tmp_path: Path) -> None:
    """A saved model says what was on it, and holds the whole of a static method; what is more is put on again."""
    cell.model.save_pretrained(tmp_path / "saved")
    implementation = families.FAMILIES[cell.family].get("attn_implementation")  # older SDPA leaves out Gemma 2's cap
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation=implementation).eval()
    assert loaded.config.longspan == cell.model.config.longspan
    assert loaded.config._attn_implementation in ("sdpa", "eager")
    if not cell.line.static:
        apply(loaded, [part for part in parse(cell.spec).methods if not part.exportable])
    torch.testing.assert_close(logits(loaded, cell.ids), logits(cell.model, cell.ids), rtol=1e-6, atol=1e-6)


# generate() in all its ways.


def generate(model: PreTrainedModel, ids: Tensor, count: int = 5, **arguments: Any) -> Tensor:
    """The new tokens."""
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **arguments}
    return model.generate(ids, max_new_tokens=count, **arguments)[:, ids.shape[1] :]


@cells()
def test_greedy(cell: Cell) -> None:
    """With a cache and without one; on few families in chunks and in a left-padded batch too."""
    prompt = cell.ids[:, : 26 if families.restarts(cell.family) else 29]
    cell.model.double()
    expected = generate(cell.model, prompt, use_cache=False)
    assert torch.equal(generate(cell.model, prompt), expected)
    if cell.family not in FEW:
        return
    assert torch.equal(generate(cell.model, prompt, prefill_chunk_size=6), expected)
    ids, mask = padded([cell.ids[0, :29], cell.ids[1, :18]])
    assert torch.equal(generate(cell.model, ids, attention_mask=mask)[0], expected[0])


@cells(families_in=FEW)
def test_beams_and_samples(cell: Cell) -> None:
    prompt = cell.ids[:1, :29]
    cell.model.double()
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(cell.model, prompt, **beams), generate(cell.model, prompt, use_cache=False, **beams))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        drawn.append(generate(cell.model, prompt, do_sample=True, num_return_sequences=2, use_cache=use_cache))
    assert torch.equal(*drawn)


@cells(families_in=FEW)
def test_one_cache_over_two_turns(cell: Cell) -> None:
    cache = DynamicCache(config=cell.model.config)
    ids = cell.ids[:, :9]
    for turn in (cell.ids[:, 9:15], cell.ids[:, 15:30], cell.ids[:, 30:31]):
        answer = generate(cell.model, ids, count=4, past_key_values=cache)
        ids = torch.cat((ids, answer, turn), dim=1)
    held = cache.get_seq_length()
    got = logits(cell.model, ids[:, held:], past_key_values=cache, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(got, logits(cell.model, ids, use_cache=False)[:, held:], **CLOSE)


@cells(families_in=FEW)
def test_other_ways_to_decode_are_right_or_refused(cell: Cell) -> None:
    """A cache of fixed size and guessing ahead from the prompt."""
    prompt = cell.ids[:1, :29]
    expected = generate(cell.model, prompt, use_cache=False)
    for arguments in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
        try:
            got = generate(cell.model, prompt, **arguments)
        except LongspanError:
            continue
        except ValueError as refused:  # transformers 5.24 asks a cache before it guesses
            if "requires a cache that can be cropped" not in str(refused):
                raise
            continue
        assert torch.equal(got, expected), arguments
