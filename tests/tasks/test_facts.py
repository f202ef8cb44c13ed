"""Facts in long texts: where they stand, what is asked, both ways of scoring, any length."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import broken, check_samples, digest, run, whole
from tasks_tiny import FakeMeter, KnownModel, byte_tokenizer, llama

from longspan.core.tokens import encode
from longspan.tasks import facts
from longspan.tasks.base import parse_task
from longspan.tasks.facts import OPPOSITE, PLACES, Reasoning, first_word
from longspan.util.errors import SpecError

SENTENCES = "".join(f"Sentence {i} has nothing to say.\n" for i in range(400))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "noise.txt"
    path.write_text(SENTENCES)
    return path


@pytest.mark.parametrize("name", ["memorize", "detect", "reasoning"])
@pytest.mark.parametrize("length", [300, 1001, 20_000])
def test_texts_fill_the_length_with_all_facts_in_them(name: str, length: int, noise: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"{name}:text={noise}")
    for sample in check_samples(task, tokenizer, length, 4):
        longest = max(len(encode(tokenizer, f" {p}")) for p in PLACES)
        assert len(sample.tokens) == length - longest
        text = str(tokenizer.decode(sample.tokens))
        assert text.endswith(sample.meta["asked"])
        for fact, at in zip(sample.meta["facts"], sample.meta["fact_tokens"], strict=True):
            assert text.count(fact) == 1
            assert str(tokenizer.decode(sample.tokens[at:])).lstrip().startswith(fact)


def test_memorize_begins_with_its_fact_and_detect_has_it_everywhere(noise: Path) -> None:
    tokenizer = byte_tokenizer()
    for sample in parse_task(f"memorize:text={noise}").samples(tokenizer, 2000, 5, 0):
        assert re.match(r"<s>\n\w+ [a-z ]+ the \w+\.\n", str(tokenizer.decode(sample.tokens)))
        assert sample.meta["depth"] == 0.0
    found = parse_task(f"detect:text={noise}").samples(tokenizer, 2000, 8, 0)
    assert [int(s.meta["depth"] * 8) for s in found] == list(range(8))
    for sample in found:
        assert sample.meta["fact_tokens"][0] / 2000 == pytest.approx(sample.meta["depth"], abs=0.06)


def test_a_text_is_tokenised_once_however_many_samples_say_it(noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, task, seen = byte_tokenizer(), parse_task(f"memorize:text={noise}"), []
    real = facts.encode
    monkeypatch.setattr(facts, "encode", lambda t, text: seen.append(text) or real(t, text))
    samples = task.samples(tokenizer, 400, 200, 0)
    assert len(seen) == len(set(seen))
    task.answer(tokenizer, samples[0]).append(-1)
    assert -1 not in task.answer(tokenizer, samples[0])  # what is handed out is the caller's
    tokenizer.add_tokens(["Mary went"])
    assert task.samples(tokenizer, 400, 8, 0) != samples[:8]


def test_facts_stand_between_sentences(noise: Path) -> None:
    tokenizer = byte_tokenizer()
    for sample in parse_task(f"detect:text={noise}").samples(tokenizer, 3000, 8, 0):
        before = str(tokenizer.decode(sample.tokens[: sample.meta["fact_tokens"][0]]))
        assert before.endswith((".", "\n", "<s>"))


def test_the_place_in_the_fact_is_the_answer(noise: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"detect:text={noise}")
    for sample in task.samples(tokenizer, 600, 20, 0):
        [fact] = sample.meta["facts"]
        who, place = fact.split()[0], fact.removesuffix(".").split()[-1]
        assert sample.meta["asked"] == f"Question: Where is {who}?\nAnswer: {who} is in the"
        assert sample.meta["place"] == place
        assert str(tokenizer.decode(task.answer(tokenizer, sample))) == f" {place}"


def solve(facts: list[str], question: str) -> str:
    """The answer by a map: places as points, a fact as a step between neighbours."""
    sides: dict[tuple[str, str], str] = {}
    for fact in facts:
        one, side, other = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups()  # type: ignore[union-attr]
        sides[side, other], sides[OPPOSITE[side], one] = one, other
    if asked := re.match(r"Question: What is (\w+) of the (\w+)\?", question):
        return sides[asked[1], asked[2]]
    asked = re.match(r"Question: What is the (\w+) (\w+) of\?", question)
    assert asked
    return sides[OPPOSITE[asked[2]], asked[1]]


def test_two_facts_answer_their_question_and_no_other() -> None:
    rng, telling, places = random.Random(0), set(), set()
    for i in range(300):
        story = Reasoning().story(rng, i, 300)
        facts = [fact for _, fact in story.facts]
        assert solve(facts, story.question) == story.place
        assert story.place in facts[story.telling]
        with pytest.raises(KeyError):  # the other fact alone does not tell
            solve([facts[1 - story.telling]], story.question)
        ending = story.question.rsplit("Answer: ", 1)[1]
        assert ending.endswith(" the")
        assert [d for d, _ in story.facts] == sorted(d for d, _ in story.facts)
        telling.add(story.telling)
        places.add(story.place)
    assert telling == {0, 1}
    assert places == set(PLACES)


def test_what_is_asked_does_not_depend_on_the_length(noise: Path) -> None:
    tokenizer = byte_tokenizer()
    for name in ("memorize", "detect", "reasoning"):
        task = parse_task(f"{name}:text={noise}")
        short, long = (task.samples(tokenizer, n, 4, 3) for n in (400, 4000))
        for a, b in zip(short, long, strict=True):
            assert [a.meta[k] for k in ("facts", "asked", "depth")] == [b.meta[k] for k in ("facts", "asked", "depth")]


def test_the_noise_begins_again_where_it_ends(noise: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"memorize:text={noise}")
    long = 3 * len(SENTENCES)
    text = str(tokenizer.decode(task.samples(tokenizer, long, 1, 0)[0].tokens))
    assert len(text) > 2.9 * len(SENTENCES)
    assert text.count("Sentence 7 has") == 3


def test_a_million_tokens_take_moments(noise: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"reasoning:text={noise}")
    start = time.process_time()
    samples = task.samples(tokenizer, 2**20, 4, 0)
    assert time.process_time() - start < 5
    assert {len(s.tokens) for s in samples} == {2**20 - 9}


def test_first_samples_stay_what_they_are(noise: Path) -> None:
    tokenizer = byte_tokenizer()
    found = {}
    for name in ("memorize", "detect", "reasoning"):
        task = parse_task(f"{name}:text={noise}")
        found[name] = digest(task, tokenizer, task.samples(tokenizer, 500, 1, 0)[0])
    assert found == {"memorize": "990002ea33f291ae", "detect": "3b794a90bc384856", "reasoning": "f59b56dd0c854d7b"}


def saying(tokenizer: Any, text: str, prompt: int, loud: str = "") -> KnownModel:
    """Goes on with `text` after a prompt of `prompt` tokens, but `loud` comes to its mind before anything else."""
    ids = [*encode(tokenizer, text), 1]

    def rule(context: int) -> torch.Tensor:
        logits = torch.zeros(258)
        logits[ids[min(max(context - prompt, 0), len(ids) - 1)]] = 5.0
        for token in encode(tokenizer, loud):
            logits[token] = 9.0
        return logits

    return KnownModel(rule, 258)


@pytest.mark.parametrize("name", ["memorize", "reasoning"])
def test_the_choice_is_among_six(name: str, noise: Path) -> None:
    """What is no place is not listened to, and only the right place scores."""
    tokenizer, task = byte_tokenizer(), parse_task(f"{name}:text={noise}")
    for sample in task.samples(tokenizer, 400, 3, 0):
        for place in PLACES:
            model = saying(tokenizer, f" {place}", len(sample.tokens), loud="XYZ")
            outcome = task.run(model, tokenizer, sample, FakeMeter())  # type: ignore[arg-type]
            assert outcome.detail["answer"] == place
            assert outcome.score == float(place == sample.meta["place"])
            assert outcome.detail["chance"] == pytest.approx(1 / 6)


def test_generation_counts_the_first_word(noise: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"detect:text={noise},score=generation")
    sample = task.samples(tokenizer, 400, 1, 0)[0]
    place = sample.meta["place"]
    for said, score in (
        (f" {place}.", 1.0),
        (f" {place}s", 0.0),
        (" XYZ", 0.0),
        ("", 0.0),
        (f"\n{place.upper()}", 1.0),
    ):
        model = saying(tokenizer, said, len(sample.tokens))
        outcome = task.run(model, tokenizer, sample, FakeMeter())  # type: ignore[arg-type]
        assert outcome.score == score, said


def test_first_words() -> None:
    assert first_word(" Kitchen. Mary") == "kitchen"
    assert first_word("** office **") == "office"
    assert first_word(" 12 ") == ""


@pytest.mark.parametrize("score", ["choice", "generation"])
def test_logits_that_are_no_numbers_are_a_failure(score: str, noise: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"memorize:text={noise},score={score}")
    outcome = broken(task, tokenizer, task.samples(tokenizer, 400, 1, 0)[0])
    assert (outcome.score, outcome.failed) == (0.0, True)


def test_an_untrained_model_is_near_chance(noise: Path) -> None:
    tokenizer, task, model = byte_tokenizer(), parse_task(f"detect:text={noise}"), llama()
    outcomes = [task.run(model, tokenizer, s, FakeMeter()) for s in task.samples(tokenizer, 250, 60, 0)]
    assert all(o.detail["answer"] in PLACES and not o.failed for o in outcomes)
    assert sum(o.score for o in outcomes) / 60 < 0.35


def test_every_cell_has_a_decoding_time(noise: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"memorize:text={noise}")
    sample = task.samples(tokenizer, 400, 1, 0)[0]
    outcome, meter = run(task, tokenizer, sample)
    assert outcome.score == 1.0
    assert meter.calls[0] == ("prefill", len(sample.tokens))
    assert sum(n for kind, n in meter.calls if kind == "decode") == len(whole(task, tokenizer, sample)) - len(
        sample.tokens
    )


def test_too_short_a_length_says_what_is_needed(noise: Path) -> None:
    tokenizer, task = byte_tokenizer(), parse_task(f"memorize:text={noise}")
    with pytest.raises(SpecError, match="at least") as error:
        task.samples(tokenizer, 50, 1, 0)
    least = int(re.findall(r"\d+", str(error.value))[0])
    assert len(task.samples(tokenizer, least, 1, 0)[0].tokens) == least - 9
