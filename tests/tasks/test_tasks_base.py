"""Tasks as text, and how they read with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tasks_tiny import SHAPE, FakeMeter, byte_tokenizer, llama
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from longspan.core.tokens import bos_id, encode, with_bos
from longspan.hf.compat import cache_argument
from longspan.hf.heads import plain_head
from longspan.reading import prefill
from longspan.reading.prefill import chunk_size, chunked_prefill, forced, greedy
from longspan.tasks import base
from longspan.tasks.base import Outcome, Sample, Task, check_fits, parse_task, task_catalogue
from longspan.util.errors import LongspanError, SpecError

IDS = [(i * 37 + 5) % 250 + 2 for i in range(60)]


def gemma2() -> Gemma2ForCausalLM:
    """A model that caps its logits after the output matrix."""
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, head_dim=16, sliding_window=512, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config).eval()


def test_catalogue_names_every_task_with_its_facts() -> None:
    tasks = task_catalogue()
    assert {"ppl", "passkey"} <= set(tasks)
    for name in ("ppl", "passkey"):
        cls = tasks[name]
        assert cls.name == name
        assert cls.title
        assert cls.measures
        assert cls.source
        assert cls.offline
        assert cls.default_count >= 1


@pytest.mark.parametrize(
    "spec",
    [
        "ppl",
        "passkey",
        "ppl:protocol=sliding,window=2048,stride=256,text=code",
        "passkey:protocol=pi,depths=10,trials=3",
    ],
)
def test_spec_is_read_back(spec: str) -> None:
    assert parse_task(spec).spec == spec
    assert parse_task(parse_task(spec).spec) == parse_task(spec)


def test_sizes_and_spaces_are_read_as_for_methods() -> None:
    assert parse_task(" ppl : protocol=sliding, window=2k ").spec == "ppl:protocol=sliding,window=2048"


def test_a_task_is_handed_back() -> None:
    task = parse_task("ppl")
    assert parse_task(task) is task


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("paskey", 'did you mean "passkey"'),
        ("", "a task is written"),
        ("ppl:", "nothing after the colon"),
        ("passkey:depth=3", 'did you mean "depths"'),
        ("passkey:protocol=ruler", "one of landmark, pi"),
        ("ppl:stride", "is not key=value"),
        ("ppl + passkey", "-t ppl -t passkey"),
        (3, "a task is written"),
    ],
)
def test_what_cannot_be_read_says_what_can(spec: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_task(spec)


def test_two_tasks_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match="two tasks are named 'ppl'"):

        @dataclass(frozen=True)
        class Other(Task):
            name: ClassVar[str] = "ppl"


def test_a_subclass_is_in_the_catalogue() -> None:
    @dataclass(frozen=True)
    class Mine(Task):
        size: int = 3
        name: ClassVar[str] = "mine"

        def samples(self, tokenizer: Any, length: int, count: int, seed: int) -> list[Sample]:
            return []

        def run(self, model: Any, tokenizer: Any, sample: Sample, meter: Any) -> Outcome:
            return Outcome(0.0)

    try:
        assert parse_task("mine:size=4") == Mine(size=4)
    finally:
        del base.Task.registry["mine"]


def test_exactly_one_bos() -> None:
    with_one, without = byte_tokenizer(), byte_tokenizer(bos=False)
    assert bos_id(with_one) == 0
    assert bos_id(without) is None
    ids = encode(with_one, "ab")
    assert 0 not in ids
    assert with_bos(with_one, ids) == [0, *ids]
    assert with_bos(with_one, [0, *ids]) == [0, *ids]
    assert with_bos(without, ids) == ids
    with pytest.raises(LongspanError, match="twice"):
        with_bos(with_one, [0, 0, *ids])


def test_a_sample_that_is_too_long_is_an_error() -> None:
    fits = [Sample("a", [1, 2])]
    assert check_fits(fits, 2) is fits
    with pytest.raises(LongspanError, match="sample a has 2 tokens"):
        check_fits(fits, 1)


def test_describe_first_shows_both_ends_with_special_tokens(tokenizer: Any) -> None:
    sample = Sample("a", with_bos(tokenizer, encode(tokenizer, "x" * 300 + "end")))
    always_visible = parse_task("ppl").describe_first(sample, tokenizer)
    assert always_visible["head"].startswith("<s>xxx")
    assert always_visible["tail"].endswith("xend")
    assert (len(always_visible["head"]), len(always_visible["tail"]), always_visible["tokens"]) == (200, 200, 304)


@pytest.mark.parametrize("chunk", [None, 1, 7, 60, 100])
def test_chunks_give_the_logits_of_one_pass(model: Any, meter: FakeMeter, chunk: int | None) -> None:
    with torch.no_grad():
        whole = model(torch.tensor([IDS])).logits[0]
    read = chunked_prefill(model, IDS, meter=meter, chunk=chunk)
    torch.testing.assert_close(read.logits, whole[-1], atol=1e-4, rtol=1e-4)
    assert read.cache.get_seq_length() == 60
    assert meter.calls == [("prefill", 60)]


@pytest.mark.parametrize("make", [llama, gemma2])
@pytest.mark.parametrize(("chunk", "first"), [(None, 0), (7, 0), (None, 25), (7, 25), (None, 59)])
def test_all_logits_are_handed_over_in_order(
    make: Any, chunk: int | None, first: int, meter: FakeMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "ROWS", 16)
    model = make()
    with torch.no_grad():
        whole = model(torch.tensor([IDS])).logits[0]
    got: list[tuple[int, torch.Tensor]] = []
    chunked_prefill(
        model,
        IDS,
        meter=meter,
        chunk=chunk,
        logits=lambda rows, position: got.append((position, rows)),
        first=first,
    )
    assert all(len(rows) <= 16 for _, rows in got)
    assert [p for p, _ in got] == [first + sum(len(r) for _, r in got[:i]) for i in range(len(got))]
    torch.testing.assert_close(torch.cat([r for _, r in got]), whole[first:], atol=1e-4, rtol=1e-4)


def test_capped_logits_are_never_taken_from_the_bare_matrix() -> None:
    assert plain_head(gemma2()) is None
    plain = llama()
    assert plain_head(plain) is plain.lm_head


def test_the_vocabulary_is_never_held_for_the_whole_length(model: Any, meter: FakeMeter) -> None:
    """The model itself is asked for one position's logits only."""
    shapes: list[int] = []
    handle = model.register_forward_hook(lambda m, args, output: shapes.append(output.logits.shape[1]))
    try:
        chunked_prefill(model, IDS, meter=meter, logits=lambda rows, position: None)
    finally:
        handle.remove()
    assert set(shapes) == {1}


def test_a_method_may_bring_its_own_cache(model: Any, meter: FakeMeter) -> None:
    own, name = DynamicCache(config=model.config), cache_argument(model.base_model)

    def swap(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        past = kwargs.get(name)
        if past is not None and past.get_seq_length() == 0:
            kwargs = {**kwargs, name: own}
        return args, kwargs

    handle = model.base_model.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        read = chunked_prefill(model, IDS, meter=meter, chunk=10)
        forced(model, read, IDS[:3], meter)
    finally:
        handle.remove()
    assert read.cache is own
    assert own.get_seq_length() == 63


def test_chunk_follows_memory(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    per_token = (8 * 64 + 4 * 96) * 4
    monkeypatch.setattr(prefill, "device_memory", lambda device: 8 * per_token * 5000)
    assert chunk_size(model, 5000) == 5000
    assert chunk_size(model, 5001) == 512  # each further chunk brings a mask of chunk × length
    monkeypatch.setattr(prefill, "device_memory", lambda device: 1)
    assert chunk_size(model, 5000) == 128


def test_forced_decoding_gives_the_logits_of_one_pass(model: Any, meter: FakeMeter) -> None:
    with torch.no_grad():
        whole = model(torch.tensor([IDS])).logits[0]
    read = chunked_prefill(model, IDS[:50], meter=meter)
    logits = forced(model, read, IDS[50:], meter)
    torch.testing.assert_close(logits, whole[50:], atol=1e-4, rtol=1e-4)
    assert meter.calls == [("prefill", 50), ("decode", 10), ("cache", 60)]


def test_greedy_is_what_generate_says(model: Any, meter: FakeMeter) -> None:
    expected = model.generate(
        torch.tensor([IDS]), max_new_tokens=12, do_sample=False, pad_token_id=1, eos_token_id=None
    )[0, 60:].tolist()
    assert 1 not in expected
    read = chunked_prefill(model, IDS, meter=meter)
    assert greedy(model, read.cache, read.logits, 12, meter) == expected
    assert meter.calls == [("prefill", 60), ("cache", 71)]


def test_greedy_ends_before_the_end_token_and_times_the_full_count(
    model: Any, meter: FakeMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = chunked_prefill(model, IDS, meter=meter)
    free = greedy(model, read.cache, read.logits, 12, meter)
    end = next(t for t in free if t != free[0])
    until = free[: free.index(end)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, end])
    short, timed = FakeMeter(), FakeMeter()
    for meter_, timing in ((short, False), (timed, True)):
        read = chunked_prefill(model, IDS, meter=meter_)
        assert greedy(model, read.cache, read.logits, 12, meter_, timing=timing) == until
    assert short.calls == [("prefill", 60), ("cache", 60 + len(until))]
    assert timed.calls == [("prefill", 60), ("decode", 11), ("cache", 71)]


def test_a_model_whose_forward_goes_past_its_base(meter: FakeMeter) -> None:
    """OPT calls its decoder by itself: states are taken from what runs."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 258, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=128)).eval()
    rows: list[torch.Tensor] = []
    chunked_prefill(model, IDS[:40], meter=meter, chunk=16, logits=lambda logits, at: rows.append(logits.clone()))
    with torch.no_grad():
        whole = model(torch.tensor([IDS[:40]])).logits[0]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-4, atol=1e-4)
