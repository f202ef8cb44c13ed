"""Passkey retrieval: the benchmark's own prompt, its fit to a length in tokens, and its score."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest
import torch
from tasks_tiny import FakeMeter, KnownModel, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from longspan.core.tokens import encode
from longspan.models import ready_folder
from longspan.tasks.base import parse_task
from longspan.tasks.passkey import (
    FILLER,
    QUESTION,
    TASK,
    Passkey,
    build_prompt,
    landmark_prompt,
    read_key,
)
from longspan.util.errors import NotSupported, SpecError

GOLDEN = [
    (0, 49674, 247, "1e61f62f8f6e74dc"),
    (100, 2654, 345, "045c8fc628f83987"),
    (1000, 33507, 1247, "716ccf4137deac68"),
    (5000, 26538, 5247, "6720fc03bc3a2f30"),
    (38000, 31235, 38247, "ebbc13c293eb1e67"),
]


def merged_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that has learned the benchmark's words, so that tokens have many lengths."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    raw.train_from_iterator([FILLER] * 10 + [TASK, QUESTION], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def test_the_prompt_is_landmarks_own() -> None:
    rng = random.Random(0)
    for n, key, characters, digest in GOLDEN:
        prompt = landmark_prompt(n, rng)
        assert (prompt.key, len(prompt.text)) == (key, characters)
        assert hashlib.sha256(prompt.text.encode()).hexdigest()[:16] == digest
        assert 0 <= prompt.depth <= 1


@pytest.mark.parametrize("spec", ["passkey", "passkey:protocol=pi", "passkey:template=chat", "passkey:answer_tokens=3"])
@pytest.mark.parametrize("length", [400, 701, 3000])
def test_prompts_fill_the_length_to_the_token(spec: str, length: int) -> None:
    task, tokenizer = parse_task(spec), byte_tokenizer()
    assert isinstance(task, Passkey)
    for sample in task.samples(tokenizer, length, 4, 0):
        assert len(sample.tokens) == length - task.budget == sample.meta["prompt_tokens"]
        assert sample.tokens[0] == 0
        assert 0 not in sample.tokens[1:]
        key = sample.meta["key"]
        text = str(tokenizer.decode(sample.tokens))
        assert text.count(f"The pass key is {key}. Remember it. {key} is the pass key.") == 1
        at = sample.meta["needle_token"]
        assert str(tokenizer.decode(sample.tokens[at:])).startswith(f"The pass key is {key}.")


@pytest.mark.parametrize("length", [200, 600])
def test_prompts_fill_the_length_where_tokens_differ_in_size(length: int) -> None:
    """No filler of any size comes nearer to the length."""
    tokenizer = merged_tokenizer()
    for sample in Passkey(protocol="pi").samples(tokenizer, length, 3, 0):
        room, depth, key = length - 10, sample.meta["depth"], sample.meta["key"]
        assert len(sample.tokens) <= room
        sizes = range(0, 8 * room, max(1, room // 5))
        others = [len(encode(tokenizer, build_prompt(key, round(depth * n), n - round(depth * n)).text)) for n in sizes]
        assert len(sample.tokens) >= max(n for n in others if n <= room)
        assert len(sample.tokens) >= room - 1


def test_keys_and_depths_are_the_same_at_every_length() -> None:
    tokenizer = byte_tokenizer()
    for task in (Passkey(), Passkey(protocol="pi")):
        short, long = task.samples(tokenizer, 500, 5, 3), task.samples(tokenizer, 2000, 5, 3)
        for a, b in zip(short, long, strict=True):
            assert [a.meta[k] for k in ("key", "depth")] == [b.meta[k] for k in ("key", "depth")]
            assert a.id == b.id
        assert [s.meta["key"] for s in task.samples(tokenizer, 500, 5, 4)] != [s.meta["key"] for s in short]


def test_k_is_the_tokens_from_the_key_to_the_end() -> None:
    samples = Passkey(protocol="pi").samples(AutoTokenizer.from_pretrained(ready_folder("longspan-7m")), 4096, 20, 0)
    assert (samples[0].meta["k"], samples[-1].meta["k"]) == (4039, 40)
    tokenizer = byte_tokenizer()
    for sample in Passkey().samples(tokenizer, 701, 4, 0):
        end = str(tokenizer.decode(sample.tokens[-sample.meta["k"] :]))
        assert end.startswith(f"The pass key is {sample.meta['key']}.")


def test_landmark_depths_cover_every_part() -> None:
    depths = Passkey()._depths(10, random.Random(1))
    assert [int(d * 10) for d in depths] == list(range(10))


def test_pi_depths_go_from_start_to_end_and_round_again() -> None:
    rng = random.Random(0)
    assert Passkey(protocol="pi")._depths(5, rng) == [0, 0.25, 0.5, 0.75, 1]
    assert Passkey(protocol="pi")._depths(1, rng) == [0.5]
    assert Passkey(protocol="pi", depths=3, trials=2)._depths(6, rng) == [0, 0.5, 1, 0, 0.5, 1]
    few = Passkey(protocol="pi", depths=32)._depths(4, rng)
    assert few[0] == 0
    assert few[-1] == 1
    assert few == sorted(few)


def test_pi_decides_how_many_samples_there_are() -> None:
    assert Passkey.default_count == 10
    assert Passkey().default_count == 10
    assert Passkey(protocol="pi", depths=32, trials=10).default_count == 320
    assert Passkey(protocol="pi", depths=32).default_count == 32


def test_key_ranges() -> None:
    tokenizer = byte_tokenizer()
    pi = [s.meta["key"] for s in Passkey(protocol="pi").samples(tokenizer, 300, 40, 0)]
    landmark = [s.meta["key"] for s in Passkey().samples(tokenizer, 300, 40, 0)]
    assert all(10_000 <= k <= 99_999 for k in pi)
    assert max(pi) > 50_000
    assert all(1 <= k <= 50_000 for k in landmark)


@pytest.mark.parametrize(
    ("answer", "key"),
    [(" 49674. Remember", 49674), ("", None), (" the key", None), (" 00042", 42), (" 12 345", 12), ("123.5", 123)],
)
def test_the_first_number_counts(answer: str, key: int | None) -> None:
    assert read_key(answer) == key


def answering(tokenizer: Any, text: str, prompt: int) -> KnownModel:
    """A model that answers `text` after a prompt of `prompt` tokens, then ends."""
    ids = [*encode(tokenizer, text), 1]

    def rule(context: int) -> torch.Tensor:
        logits = torch.zeros(258)
        logits[ids[min(max(context - prompt, 0), len(ids) - 1)]] = 5.0
        return logits

    return KnownModel(rule, 258)


@pytest.mark.parametrize(
    ("answer", "found"),
    [(" {key}. Rem", True), (" {key}", True), ("{key}5", False), (" 1{key}", False), (" none", False), ("", False)],
)
def test_score_is_one_for_the_key_and_zero_for_all_else(answer: str, found: bool) -> None:
    tokenizer, meter, task = byte_tokenizer(), FakeMeter(), Passkey(protocol="pi")
    sample = task.samples(tokenizer, 400, 3, 0)[1]
    model = answering(tokenizer, answer.format(key=sample.meta["key"]), len(sample.tokens))
    outcome = task.run(model, tokenizer, sample, meter)
    assert (outcome.score, outcome.detail["found"], outcome.failed) == (float(found), found, False)
    assert outcome.detail["answer"] == answer.format(key=sample.meta["key"])[:10]
    assert outcome.detail["depth"] == 0.5
    assert meter.calls == [("prefill", 390), ("decode", 9), ("cache", 399)]
    json.dumps(outcome.detail, allow_nan=False)


def test_logits_that_are_no_numbers_are_a_failure() -> None:
    tokenizer, task = byte_tokenizer(), Passkey()
    sample = task.samples(tokenizer, 400, 1, 0)[0]
    model = KnownModel(lambda context: torch.full((258,), float("nan")), 258)
    outcome = task.run(model, tokenizer, sample, FakeMeter())
    assert outcome.failed
    assert outcome.score == 0


def test_chat_template_is_used_only_when_asked_for() -> None:
    tokenizer = byte_tokenizer()
    plain = Passkey().samples(tokenizer, 500, 1, 0)[0]
    chat = Passkey(template="chat").samples(tokenizer, 500, 1, 0)[0]
    assert str(tokenizer.decode(plain.tokens)).startswith("<s>" + TASK)
    assert str(tokenizer.decode(plain.tokens)).endswith(QUESTION)
    assert str(tokenizer.decode(chat.tokens)).startswith("<s>[user]" + TASK)
    assert str(tokenizer.decode(chat.tokens)).endswith("[assistant]")
    assert (plain.meta["template"], chat.meta["template"]) == ("none", "chat")


def test_no_or_refusing_template_is_said() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(NotSupported, match="use template=none"):
        Passkey(template="chat").samples(tokenizer, 500, 1, 0)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(NotSupported, match="no users here"):
        Passkey(template="chat").samples(tokenizer, 500, 1, 0)


def test_too_short_a_length_says_what_is_needed() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(SpecError, match=r"at least (\d+) tokens is needed, not 200") as error:
        Passkey(protocol="pi").samples(tokenizer, 200, 1, 0)
    least = int(str(error.value).split("at least ")[1].split()[0])
    assert len(Passkey(protocol="pi").samples(tokenizer, least, 1, 0)[0].tokens) == least - 10
