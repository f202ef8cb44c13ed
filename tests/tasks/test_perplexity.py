"""Perplexity: every protocol on a model whose loss depends on the context's length alone, and on a real forward."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tasks_tiny import FakeMeter, KnownModel, byte_tokenizer, llama
from torch import Tensor

from longspan.tasks.base import Sample, parse_task
from longspan.tasks.perplexity import (
    PROTOCOLS,
    Perplexity,
    Window,
    by_position,
    longlora,
    mean_loss,
    nonoverlapping,
    rolling,
    sliding,
    whole,
    yarn,
)
from longspan.util.errors import SpecError

SLIDING = ["nonoverlapping", "sliding", "rolling", "longlora", "yarn"]


def loss(context: int) -> float:
    """What the known model loses on a token that it predicts from `context` tokens."""
    return 1.0 + 8.0 / context


def rule(context: int) -> Tensor:
    """Logits over two tokens, such that token 1 costs `loss(context)`."""
    p = math.exp(-loss(context))
    return torch.tensor([0.0, math.log(p / (1 - p))])


def losses(windows: list[Window]) -> list[Tensor]:
    return [torch.tensor([loss(p - w.start) for p in range(w.first, w.end)], dtype=torch.float64) for w in windows]


def score(protocol: str, total: int, length: int, stride: int = 0) -> float:
    return mean_loss(protocol, losses(PROTOCOLS[protocol](total, length, stride)))


def contexts(windows: list[Window]) -> dict[int, list[int]]:
    """For each token that is counted, from how many tokens it was predicted."""
    found: dict[int, list[int]] = {}
    for w in windows:
        for p in range(w.first, w.end):
            found.setdefault(p, []).append(p - w.start)
    return found


def test_stride_of_the_window_is_nonoverlapping() -> None:
    for blocks in (1, 2, 5):
        assert sliding(blocks * 100 + 1, 100, 100) == nonoverlapping(blocks * 100 + 1, 100, 100)


def test_stride_one_is_alibis_sliding() -> None:
    """Each token is predicted from the `length` tokens before it, or from all there are."""
    found = contexts(sliding(500, 100, 1))
    assert found == {p: [min(p, 100)] for p in range(1, 500)}


@pytest.mark.parametrize("total", [101, 401, 437, 1000, 64, 2])
@pytest.mark.parametrize("protocol", ["window", "nonoverlapping", "sliding", "rolling", "yarn"])
def test_every_token_but_the_first_counts_once(protocol: str, total: int) -> None:
    found = contexts(PROTOCOLS[protocol](total, 100, 30))
    assert sorted(found) == list(range(1, total))
    assert all(len(c) == 1 for c in found.values())


@pytest.mark.parametrize("total", [101, 401, 437, 1000, 64])
@pytest.mark.parametrize("protocol", SLIDING)
def test_the_model_never_reads_more_than_the_window(protocol: str, total: int) -> None:
    for w in PROTOCOLS[protocol](total, 100, 30):
        assert 0 <= w.start < w.first < w.end <= total
        assert w.end - w.start - 1 <= 100


def test_what_is_left_at_the_end() -> None:
    """sliding and rolling end with a full window, nonoverlapping and yarn with a short one; longlora drops the rest, and as
    its script does the last full window."""
    assert sliding(250, 100, 60)[-1] == Window(149, 250, 221)
    assert rolling(250, 100, 7)[-1] == Window(149, 250, 201)
    assert nonoverlapping(250, 100, 7)[-1] == Window(200, 250, 201)
    assert yarn(250, 100, 60)[-1] == Window(180, 250, 220)
    assert longlora(250, 100, 60) == [Window(0, 100, 1), Window(60, 160, 61)]
    assert whole(250, 100, 60) == [Window(0, 250, 1)]


def test_longlora_counts_overlaps_again() -> None:
    assert contexts(longlora(1000, 100, 10))[505] == list(range(95, 0, -10))
    assert longlora(100, 100, 256) == [Window(0, 100, 1)]


@pytest.mark.parametrize("total", [164, 165, 429, 1000])
def test_longlora_reads_the_windows_of_its_script(total: int) -> None:
    """By the rule of the author's eval.py: starts from 0 in steps, below total - length, without the last."""
    starts = list(range(0, total - 100, 64))
    starts.pop()
    assert [w.start for w in longlora(total, 100, 64)] == (starts or [0])


def test_protocols_give_the_numbers_that_the_formula_says() -> None:
    length, stride, total = 100, 25, 301

    def mean(cs: Any) -> float:
        values = [loss(c) for c in cs]
        return sum(values) / len(values)

    assert score("window", total, length) == pytest.approx(mean(range(1, 301)))
    assert score("nonoverlapping", total, length) == pytest.approx(mean(range(1, 101)))
    assert score("rolling", total, length) == pytest.approx(mean(range(1, 101)))
    first, last = list(range(1, 101)), list(range(76, 101))
    assert score("sliding", total, length, stride) == pytest.approx(mean(first + last * 8))
    assert score("longlora", total, length, stride) == pytest.approx(mean(range(1, 100)))
    means = [mean(range(1, 100)), *[mean(range(75, 100))] * 8, mean([75])]
    assert score("yarn", total, length, stride) == pytest.approx(sum(means) / 10)


def test_yarns_mean_of_windows_is_not_the_mean_of_tokens() -> None:
    windows = yarn(301, 100, 25)
    assert mean_loss("yarn", losses(windows)) < mean_loss("sliding", losses(windows)) - 0.05


def test_by_position_keeps_the_total_and_the_order() -> None:
    windows = whole(640, 640, 1)
    means, counts = by_position(windows, losses(windows), 640)
    assert counts == [9] + [10] * 63
    assert all(a > b for a, b in itertools.pairwise(means))
    assert sum(m * c for m, c in zip(means, counts, strict=True)) / 639 == pytest.approx(score("window", 640, 640))
    assert by_position([Window(0, 20, 1)], losses([Window(0, 20, 1)]), 640)[0][10] is None


def run(task: Perplexity, model: Any, tokenizer: Any, ids: list[int], begins_with: str | None = None) -> Any:
    meter = FakeMeter()
    outcome = task.run(model, tokenizer, Sample("s", ids, {"begins_with": begins_with}), meter)
    return outcome, meter


@pytest.mark.parametrize("protocol", SLIDING)
def test_run_follows_the_protocol_on_a_model_with_known_losses(protocol: str) -> None:
    strided = {"stride": 32} if protocol in ("sliding", "longlora", "yarn") else {}
    task = Perplexity(protocol=protocol, window=128, **strided)
    model = KnownModel(rule, 2)
    outcome, _ = run(task, model, byte_tokenizer(), [1] * 500)
    assert outcome.score == pytest.approx(score(protocol, 500, 128, 32), abs=1e-5)
    assert outcome.detail["protocol"] == protocol
    assert model.longest <= 128


def test_window_is_one_forward_over_everything() -> None:
    model = KnownModel(rule, 2)
    outcome, meter = run(Perplexity(), model, byte_tokenizer(), [1] * 500)
    assert outcome.score == pytest.approx(score("window", 500, 500), abs=1e-5)
    assert meter.calls == [("prefill", 491), ("decode", 8), ("cache", 499)]
    assert outcome.detail["tokens"] == 499


def test_loss_is_the_models_own() -> None:
    model, ids = llama(), [(i * i + 3 * i) % 256 + 2 for i in range(200)]
    outcome, _ = run(Perplexity(), model, byte_tokenizer(), ids)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss
    assert outcome.score == pytest.approx(float(expected), abs=1e-4)
    assert outcome.detail["ppl"] == pytest.approx(math.exp(outcome.score))


def test_sliding_is_what_separate_forwards_say() -> None:
    model, ids = llama(), [(i * i + 3 * i) % 256 + 2 for i in range(150)]
    outcome, _ = run(Perplexity(protocol="sliding", window=64, stride=16), model, byte_tokenizer(), ids)
    total = []
    with torch.no_grad():
        for w in sliding(150, 64, 16):
            logits = model(torch.tensor([ids[w.start : w.end]])).logits[0]
            rows = logits[w.first - w.start - 1 : -1]
            total.append(F.cross_entropy(rows, torch.tensor(ids[w.first : w.end]), reduction="none"))
    assert outcome.score == pytest.approx(float(torch.cat(total).mean()), abs=1e-4)


def test_yarn_begins_every_window_with_bos() -> None:
    seen: list[list[int]] = []
    model = llama()
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    ids = [0] + [(i * 7) % 250 + 2 for i in range(199)]
    run(Perplexity(protocol="yarn", window=64, stride=32), model, byte_tokenizer(), ids, begins_with="<s>")
    handle.remove()
    windows = [x for x in seen if len(x) > 8]
    assert len(windows) >= 5
    assert all(x[0] == 0 and 0 not in x[1:] for x in windows)


def test_bits_per_byte_and_words_come_from_the_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("x" + "word " * 30, add_special_tokens=False)["input_ids"]
    outcome, _ = run(Perplexity(), llama(), tokenizer, ids)
    nats = outcome.score * 150
    assert outcome.detail["bits_per_byte"] == pytest.approx(nats / 150 / math.log(2))
    assert outcome.detail["nll_per_word"] == pytest.approx(nats / 30)


CJK = "長い文章を読む模型は、どこまで読めるのでしょうか。" * 6
ENGLISH = "extraordinarily uncharacteristic misunderstandings reappear " * 5


@pytest.mark.parametrize("text", [CJK, ENGLISH], ids=["cjk", "english"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bytes_and_words_are_those_of_the_whole_text(protocol: str, text: str) -> None:
    """Windows begin and end within characters and words, which must not count as several."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    settings: dict[str, Any] = {} if protocol == "window" else {"window": 64}
    settings |= {"stride": 1 if protocol == "sliding" else 32} if protocol in ("sliding", "yarn", "longlora") else {}
    outcome, _ = run(Perplexity(protocol=protocol, **settings), KnownModel(rule_of_bytes, 258), tokenizer, ids)
    last = PROTOCOLS[protocol](len(ids), settings.get("window", len(ids)), settings.get("stride", 1))[-1].end
    words = len(bytes(text.encode()[: last - 1]).decode(errors="ignore").split())
    assert outcome.detail["bits_per_byte"] == pytest.approx(outcome.score / math.log(2), rel=0.01)
    assert outcome.detail["nll_per_word"] == pytest.approx(outcome.score * (last - 1) / words, rel=0.01)


def test_every_figure_of_a_protocol_is_its_score_in_other_units() -> None:
    """Under yarn and longlora the score is the mean of the windows' means, and so is what stands beside it."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(ENGLISH)["input_ids"]
    for protocol in ("sliding", "yarn", "longlora"):
        task = Perplexity(protocol=protocol, window=128, stride=48)
        detail = (outcome := run(task, KnownModel(rule_of_bytes, 258), tokenizer, ids)[0]).detail
        assert detail["bits_per_byte"] == pytest.approx(math.log2(detail["ppl"]))
        assert detail["ppl"] == pytest.approx(math.exp(outcome.score))
        assert detail["mean_of"] == ("all counted tokens" if protocol == "sliding" else "the windows' means")


def rule_of_bytes(context: int) -> Tensor:
    """Logits that say less the more is known, whatever comes."""
    return torch.linspace(0, 1 + 8 / context, 258)


def test_logits_that_are_no_numbers_are_a_failure() -> None:
    model = KnownModel(lambda context: torch.full((300,), math.nan if context > 50 else 0.0), 300)
    outcome, _ = run(Perplexity(), model, byte_tokenizer(), [1] * 100)
    assert outcome.failed
    assert outcome.score == pytest.approx(math.log(300))
    assert "not numbers" in outcome.detail["reason"]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(" ".join(f"sentence {i} of the book." for i in range(400)))
    return path


def test_shorter_and_fewer_windows_are_parts_of_longer_and_more(book: Path) -> None:
    task, tokenizer = Perplexity(text=str(book)), byte_tokenizer()
    short, long = task.samples(tokenizer, 100, 4, 0), task.samples(tokenizer, 1000, 6, 0)
    assert [len(s.tokens) for s in short] == [100] * 4
    assert [len(s.tokens) for s in long] == [1000] * 6
    for a, b in zip(short, long, strict=False):
        assert a.id == b.id
        assert a.tokens == b.tokens[:100]
        assert a.tokens[0] == 0
        assert 0 not in a.tokens[1:]
    assert task.samples(tokenizer, 100, 4, 1)[0].tokens != short[0].tokens


@pytest.mark.parametrize("count", [2, 5, 8, 13])
def test_windows_are_spread_over_the_whole_text(book: Path, count: int) -> None:
    samples = Perplexity(text=str(book)).samples(byte_tokenizer(), 100, count, 0)
    total = samples[0].meta["text_tokens"]
    starts = sorted(s.meta["start"] for s in samples)
    gaps = [b - a for a, b in zip(starts, [*starts[1:], starts[0] + total], strict=True)]
    assert max(gaps) < 2 * total / count
    assert min(gaps) > 0.3 * total / count


def test_rolling_has_a_prefix_token_even_without_bos(book: Path) -> None:
    tokenizer = byte_tokenizer(bos=False)
    rolled = Perplexity(protocol="rolling", window=64, text=str(book)).samples(tokenizer, 100, 1, 0)[0]
    plain = Perplexity(text=str(book)).samples(tokenizer, 100, 1, 0)[0]
    assert rolled.tokens == [1, *plain.tokens[:-1]]
    assert (rolled.meta["begins_with"], plain.meta["begins_with"]) == ("</s>", None)


def test_too_little_text_says_how_much_there_is(book: Path) -> None:
    have = len(book.read_text()) + 2
    with pytest.raises(SpecError, match=f"49,999 tokens of text are needed and .* has {have:,}"):
        Perplexity(text=str(book)).samples(byte_tokenizer(), 50_000, 1, 0)
    with pytest.raises(SpecError, match="at least 64 tokens"):
        Perplexity().samples(byte_tokenizer(), 63, 1, 0)


def test_the_digest_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    task = Perplexity(text=str(path))
    before = task.data_digest()
    path.write_text("two")
    assert task.data_digest() != before


def test_samples_are_the_same_in_another_process(book: Path) -> None:
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from tasks_tiny import byte_tokenizer;"
        "from longspan.tasks.base import parse_task; t = byte_tokenizer();"
        "print(json.dumps([[s.id, s.tokens, s.meta] for spec in sys.argv[2:] "
        "for s in parse_task(spec).samples(t, 700, 3, 5)]))"
    )
    specs = [f"ppl:text={book}", "passkey", "passkey:protocol=pi"]
    command = [sys.executable, "-c", code, str(Path(__file__).parent), *specs]
    other = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    tokenizer = byte_tokenizer()
    mine = [[s.id, s.tokens, s.meta] for spec in specs for s in parse_task(spec).samples(tokenizer, 700, 3, 5)]
    assert other == mine


def test_outcomes_are_json() -> None:
    outcome, _ = run(Perplexity(), llama(), byte_tokenizer(), [5] * 100)
    assert json.loads(json.dumps(outcome.detail, allow_nan=False))["tokens"] == 99
