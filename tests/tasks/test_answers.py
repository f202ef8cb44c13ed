"""Judging known answers: against plain forwards and greedy decoding, on a real cache, with methods that bound it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tasks_tiny import FakeMeter, KnownModel, byte_tokenizer, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import longspan as ls
from longspan.core.tokens import encode
from longspan.reading.prefill import Prefilled, chunked_prefill, forced, greedy
from longspan.tasks.answers import PARTS, WORDS, by_position, check_options, choose, continuation, judge, judge_stream
from longspan.util.errors import LongspanError

IDS = [(i * 37 + 5) % 250 + 2 for i in range(90)]


def dummy_prefix_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a space before every text, as Llama 2's does."""
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz:", "▁ki"])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "ki")] if "ki" in vocabulary else [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_words_are_enough_and_differ() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 64


def test_a_continuation_has_no_prefix_of_its_own() -> None:
    plain, spaced = byte_tokenizer(), dummy_prefix_tokenizer()
    for tokenizer in (plain, spaced):
        got = continuation(tokenizer, "in the", " hall")
        assert encode(tokenizer, "in the") + got == encode(tokenizer, "in the hall")
    assert len(continuation(spaced, "is:", "x")) == 1
    assert len(encode(spaced, "x")) == 2


def test_a_continuation_that_shares_a_token_is_taken_alone() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*letters, "ab"])}, merges=[("a", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert len(encode(tokenizer, "ab")) == 1
    assert continuation(tokenizer, "a", "b") == encode(tokenizer, "b")


@pytest.mark.parametrize("first", [1, 40, 75, 88, 89])
def test_judging_is_one_plain_forward(first: int) -> None:
    model, meter = llama(), FakeMeter()
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, first - 1 : -1]
    judged = judge(model, IDS, first, meter)
    assert judged.ids == IDS[first:]
    assert judged.likeliest == logits.argmax(-1).tolist()
    expected = F.cross_entropy(logits, torch.tensor(IDS[first:]), reduction="none").tolist()
    assert judged.losses == pytest.approx(expected, rel=1e-4)
    one_by_one = min(8, 89 - first)
    assert meter.calls[0] == ("prefill", 89 - one_by_one)
    assert meter.calls[1:] == ([("decode", one_by_one)] if one_by_one else []) + [("cache", 89)]


def test_exact_is_what_greedy_decoding_says() -> None:
    model, meter = llama(), FakeMeter()
    read = chunked_prefill(model, IDS, meter=meter)
    said = greedy(model, read.cache, read.logits, 12, meter)
    assert len(said) == 12
    assert judge(model, IDS + said, len(IDS), meter).exact
    other = [*said[:6], (said[6] + 1) % 258, *said[7:]]
    assert not judge(model, IDS + other, len(IDS), meter).exact


def test_a_stream_is_read_once_on_one_cache() -> None:
    model, meter = llama(), FakeMeter()
    spans = [(20, 24), (40, 41), (88, 90)]
    judged = judge_stream(model, IDS, spans, meter)
    one = judge(model, IDS, 1, FakeMeter())
    for said, (start, end) in zip(judged, spans, strict=True):
        part = one.part(start - 1, end - 1)
        assert said.likeliest == part.likeliest
        assert said.losses == pytest.approx(part.losses, rel=1e-4)
    assert [c for c in meter.calls if c[0] == "prefill"] == [("prefill", 20), ("prefill", 16), ("prefill", 47)]
    assert [c for c in meter.calls if c[0] == "decode"] == [("decode", 4), ("decode", 1), ("decode", 2)]
    assert meter.calls[-1] == ("cache", 90)


def test_a_bounded_cache_goes_on_through_the_stream() -> None:
    """StreamingLLM gives turn by turn what it gives in one piece, and keeps no more than it says."""
    model = llama()
    ls.apply(model, "streaming:sinks=2,window=14")
    spans = [(20, 24), (40, 41), (70, 73), (88, 90)]
    kept: list[int] = []
    meter = FakeMeter()
    meter.cache = lambda past: kept.append(past.layers[0].keys.shape[2])  # type: ignore[method-assign]
    judged = judge_stream(model, IDS, spans, meter)
    one = judge(model, IDS, 1, FakeMeter())
    for said, (start, end) in zip(judged, spans, strict=True):
        assert said.losses == pytest.approx(one.part(start - 1, end - 1).losses, rel=1e-3)
    assert max(kept) <= 16


def chosen(logits: dict[tuple[int, ...], dict[int, float]], options: dict[str, list[int]]) -> tuple[str, FakeMeter]:
    """The choice of a model whose logits depend on what it was fed after its prompt."""
    fed: list[int] = []

    class Follows(KnownModel):
        def forward(self, input_ids: Any, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
            fed.extend(input_ids[0].tolist())
            return super().forward(input_ids, past_key_values, use_cache, logits_to_keep)

    def rule(context: int) -> torch.Tensor:
        row = torch.zeros(20)
        for token, value in logits.get(tuple(fed[1:]), {}).items():
            row[token] = value
        return row

    model, meter = Follows(rule, 20), FakeMeter()
    read = chunked_prefill(model, [1], meter=meter)  # type: ignore[arg-type]
    return choose(model, read, options, meter), meter  # type: ignore[arg-type]


def test_options_are_told_apart_where_they_differ() -> None:
    options = {"bath": [4, 5, 9], "bed": [4, 6], "hall": [7, 8]}
    assert chosen({(): {4: 2.0, 7: 3.0, 11: 9.0}}, options)[0] == "hall"
    assert chosen({(): {4: 3.0, 7: 2.0}, (4,): {5: 1.0, 6: 2.0, 7: 9.0}}, options)[0] == "bed"
    assert chosen({(): {4: 3.0, 7: 2.0}, (4,): {5: 2.0, 6: 1.0}, (4, 5): {9: -50.0}}, options)[0] == "bath"
    meter = chosen({(): {4: 3.0}, (4,): {5: 2.0}}, options)[1]
    assert sum(n for kind, n in meter.calls if kind == "decode") == 3  # the whole option is fed


def test_the_first_token_that_all_share_decides_nothing() -> None:
    options = {"bath": [3, 4], "hall": [3, 7]}
    assert chosen({(): {3: -9.0, 7: 5.0}, (3,): {4: 1.0, 7: 0.5}}, options)[0] == "bath"


def test_options_that_cannot_be_told_apart_are_refused() -> None:
    check_options({"a": [1, 2], "b": [1, 3]}, "t")
    for ids in ([1, 2], [1]):
        with pytest.raises(LongspanError, match="does not tell"):
            check_options({"a": [1, 2], "b": ids}, "t")


def test_shares_by_position() -> None:
    found = by_position([0, 1, 50, 99], [True, False, True, False], 100)
    assert found["asked_by_position"] == [2, *[0] * 15, 1, *[0] * 14, 1]
    assert found["right_by_position"][0] == 0.5
    assert found["right_by_position"][16] == 1.0
    assert found["right_by_position"][-1] == 0.0
    assert len(found["right_by_position"]) == PARTS


def test_forcing_leaves_the_reader_where_it_is() -> None:

    model, meter = llama(), FakeMeter()
    read = chunked_prefill(model, IDS[:50], meter=meter)
    assert isinstance(read, Prefilled)
    logits = forced(model, read, IDS[50:60], meter)
    assert torch.equal(read.logits, logits[-1])
    assert read.cache.get_seq_length() == 60
