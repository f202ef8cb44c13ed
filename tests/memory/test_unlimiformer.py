"""Unlimiformer on tiny random BART, T5 and LED: against full cross-attention, and against the paper's formula in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    LEDConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
)
from transformers.modeling_outputs import BaseModelOutput

import longspan as ls
from longspan.core.facts import facts_of
from longspan.engine.retrieval import top as retrieval
from longspan.hf import encoder_decoder
from longspan.hf.site import current
from longspan.memory.unlimiformer import Encoded, Given, windows
from longspan.util.errors import LongspanError, NotSupported, SpecError
from shared_model import (
    THREADS,
    assert_checkpoints_change_no_gradient,
    assert_threads_get_what_each_gets_alone,
    in_the_midst,
)

WINDOW = 16
BART = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
    "tie_word_embeddings": False,
    "init_std": 0.2,
    "dropout": 0.0,
}
T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "n_positions": WINDOW,
    "pad_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_factor": 1.0,
    "dropout_rate": 0.0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bart": lambda: BartConfig(**BART, max_position_embeddings=WINDOW),
    "t5": lambda: T5Config(**T5),
    "led": lambda: LEDConfig(
        **BART, max_encoder_position_embeddings=WINDOW, max_decoder_position_embeddings=64, attention_window=8
    ),
}
each_family = pytest.mark.parametrize("family", CONFIGS)


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[family]()).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # biases start at zero, where one left out would not be seen
            nn.init.normal_(parameter, std=0.3)
    return model


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(seed))


def states_by_hand(model: PreTrainedModel, row: Tensor) -> Tensor:
    """(n, d): windows of half overlap, one at a time through the plain encoder, the middle halves side by side."""
    n, quarter = len(row), WINDOW // 4
    if n <= WINDOW:
        return model.get_encoder()(input_ids=row[None])[0][0]
    kept = []
    at = 0
    while at + WINDOW < n:
        out = model.get_encoder()(input_ids=row[None, at : at + WINDOW])[0][0]
        kept.append(out[(quarter if at else 0) : 3 * quarter])
        at += WINDOW // 2
    done = sum(map(len, kept))
    last = model.get_encoder()(input_ids=row[None, n - WINDOW :])[0][0]
    return torch.cat([*kept, last[done - (n - WINDOW) :]])


def cross_modules(model: PreTrainedModel) -> list[nn.Module]:
    ends = ("encoder_attn", "EncDecAttention")
    return [m for name, m in model.get_decoder().named_modules() if name.endswith(ends)]


def parts(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear, float]:
    """Projections of query, key, value and output, and the scale of the scores."""
    if hasattr(module, "q_proj"):
        return module.q_proj, module.k_proj, module.v_proj, module.out_proj, module.head_dim**-0.5
    return module.q, module.k, module.v, module.o, 1.0


def by_the_formula(module: nn.Module, hidden: Tensor, states: Tensor, k: int) -> Tensor:
    """Cross-attention (B, T, d) of hidden (B, T, d) over each query's and head's k best of states (N, d)."""
    q, key, value, out, scale = parts(module)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, -1)).transpose(-3, -2)

    scores = split(q(hidden)) @ split(key(states)).mT * scale
    kept = scores >= scores.topk(k, dim=-1).values[..., -1:]
    weights = scores.masked_fill(~kept, float("-inf")).softmax(-1)
    return out((weights @ split(value(states))).transpose(1, 2).flatten(2))


# Windows.


@pytest.mark.parametrize(("window", "overlap"), [(16, 0.5), (16, 0.0), (10, 0.3), (7, 0.9), (1024, 0.5)])
def test_windows_keep_each_token_once_with_its_surroundings(window: int, overlap: float) -> None:
    for length in (1, window - 1, window, window + 1, 3 * window - 1, 5 * window + 3):
        cut = windows(length, window, overlap)
        assert [t for w in cut for t in range(w.first, w.last)] == list(range(length))
        for w in cut:
            assert w.end - w.start == min(window, length) and 0 <= w.start <= w.first < w.last <= w.end <= length
            margin = int(window * overlap / 2)
            assert w.first - w.start >= margin or w.first == 0
            assert w.end - w.last >= margin or w.last == length


# What is attended to.


@each_family
def test_retrieving_everything_is_full_cross_attention(family: str) -> None:
    """Over the same states; and one model with another batch of windows, one without overlap."""
    model, ids, asked = build(family), text(2, 101), text(2, 9, seed=1)
    with torch.no_grad():
        states = torch.stack([states_by_hand(model, row) for row in ids])
        full = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=asked).logits
        for batch in (1, 3, 100):
            with ls.applied(model, f"unlimiformer:k=101,batch={batch}"):
                ours = model(input_ids=ids, decoder_input_ids=asked).logits
            torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5)
        with ls.applied(model, "unlimiformer:k=101,overlap=0"):
            other = model(input_ids=ids, decoder_input_ids=asked).logits
        assert (other - full).abs().max() > 1e-3


@each_family
def test_the_k_best_of_each_head_forward_and_backward(family: str) -> None:
    model = build(family, torch.float64)
    hidden, states = torch.randn(2, 3, 2, 5, 32, dtype=torch.float64).unbind(), torch.randn(70, 32, dtype=torch.float64)
    hidden = hidden[0].flatten(0, 1).requires_grad_()
    states.requires_grad_()
    with ls.applied(model, "unlimiformer:k=6"):
        for module in cross_modules(model):
            given = encoder_decoder.attach(
                torch.zeros(6, 1, 32, dtype=torch.float64), Given(Encoded([states]), "retrieval")
            )
            want = by_the_formula(module, hidden, states, 6)
            weight = torch.randn_like(want)
            learns = [hidden, states, *(p for p in module.parameters())]
            expected = torch.autograd.grad((want * weight).sum(), learns, retain_graph=True)
            got = module(hidden, key_value_states=given)[0]
            torch.testing.assert_close(got, want)
            grads = torch.autograd.grad((got * weight).sum(), learns, allow_unused=True)
            for ours, theirs in zip(grads, expected, strict=True):
                if ours is None:  # the keys' bias
                    assert theirs.abs().max() < 1e-12
                else:
                    torch.testing.assert_close(ours, theirs)


@each_family
def test_moved_scores_are_the_usual_ones_up_to_a_constant_of_the_query(family: str) -> None:
    module = cross_modules(build(family, torch.float64))[0]
    q, key, _, _, scale = parts(module)
    hidden, states = torch.randn(5, 32, dtype=torch.float64), torch.randn(40, 32, dtype=torch.float64)
    query = q(hidden).unflatten(-1, (4, -1))
    usual = torch.einsum("thd,nhd->thn", query, key(states).unflatten(-1, (4, -1))) * scale
    moved = torch.einsum("thd,hdm,nm->thn", query, key.weight.unflatten(0, (4, -1)), states) * scale
    constant = usual - moved
    torch.testing.assert_close(constant, constant[..., :1].expand_as(constant), rtol=0, atol=1e-12)
    assert torch.equal(usual.topk(7).indices, moved.topk(7).indices)
    assert (constant.abs().max() > 1e-2) == (family != "t5"), "T5's keys have no bias, the others' have"


@each_family
def test_rows_of_different_length_are_read_as_if_alone(family: str) -> None:
    model = ls.apply(build(family), "unlimiformer:k=7,batch=3")
    lengths, asked = (75, 5, 33, 16), text(4, 6, seed=1)
    ids, mask = torch.full((4, 80), 9), torch.zeros(4, 80, dtype=torch.long)
    for row, n in enumerate(lengths):
        start = 5 if row == 2 else 0  # padding on both sides
        ids[row, start : start + n], mask[row, start : start + n] = text(n, seed=row), 1
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, decoder_input_ids=asked).logits
        again = model(input_ids=ids * mask + (1 - mask), attention_mask=mask, decoder_input_ids=asked).logits
        for row, n in enumerate(lengths):
            alone = model(input_ids=text(1, n, seed=row), decoder_input_ids=asked[row : row + 1]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        encoded = Encoded.of(model, ids, mask)
    assert torch.equal(together, again), "what stands in the padding is not read"
    assert [len(row) for row in encoded.rows] == list(lengths)


def test_a_window_beyond_the_first_is_heard() -> None:
    model, ids, asked = ls.apply(build("bart"), "unlimiformer"), text(1, 90), text(1, 4, seed=1)
    other = torch.cat((ids[:, :70], text(1, 20, seed=2)), dim=1)
    with torch.no_grad():
        assert (
            model(input_ids=ids, decoder_input_ids=asked).logits
            - model(input_ids=other, decoder_input_ids=asked).logits
        ).abs().max() > 1e-3


def test_led_is_given_its_part_of_the_global_mask() -> None:
    model, ids, asked = build("led"), text(1, 40), text(1, 4, seed=1)
    everywhere, nowhere = torch.zeros_like(ids), torch.zeros_like(ids)
    everywhere[:, 30] = 1
    with ls.applied(model, "unlimiformer"), torch.no_grad():
        plain, none, one = (
            Encoded.of(model, ids, **more).rows[0]
            for more in ({}, {"global_attention_mask": nowhere}, {"global_attention_mask": everywhere})
        )
    torch.testing.assert_close(plain, none)
    changed = ((plain - one).abs().amax(-1) > 1e-4).nonzero()[:, 0]
    assert len(changed) and changed.min() >= 20, "only windows with token 30 have it"
    assert asked.shape


# Generation.


@each_family
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_generation_is_the_plain_models_over_all_states(family: str, how: dict[str, Any]) -> None:
    model, ids = build(family), text(2, 70)
    how = {**how, "no_repeat_ngram_size": 1}  # models of random weights would repeat one token, whatever they read
    with torch.no_grad():
        states = torch.stack([states_by_hand(model, row) for row in ids])
        want = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=states), max_new_tokens=8, **how)
        with ls.applied(model, "unlimiformer:k=70"):
            torch.testing.assert_close(model.generate(ids, max_new_tokens=8, **how), want)
    assert not torch.equal(want[0], want[-1]), "the two texts are answered alike, which proves little"


@each_family
def test_decoding_with_a_cache_is_one_forward(family: str) -> None:
    model, ids = ls.apply(build(family), "unlimiformer:k=5"), text(2, 70)
    out = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        once = model(input_ids=ids, decoder_input_ids=out.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(out.scores, dim=1), once[:, -8:], rtol=1e-4, atol=1e-5)
    cross = out.past_key_values.cross_attention_cache
    assert {cross.get_seq_length(layer) for layer in range(2)} == {1}, "the model's cache holds the stand-in alone"


def test_samples_of_a_text_share_its_store() -> None:
    model, ids = ls.apply(build("bart"), "unlimiformer:k=5"), text(2, 70)
    how = {"do_sample": True, "num_return_sequences": 3, "return_dict_in_generate": True, "output_logits": True}
    logits = model.generate(ids, max_new_tokens=1, **how).logits[0]
    torch.testing.assert_close(logits, logits[[0, 3]].repeat_interleave(3, dim=0))
    assert (logits[0] - logits[3]).abs().max() > 1e-3


# Memory.


class Largest(TorchDispatchMode):
    """The most elements of any tensor made within the block; views are not."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = (x for x in tree_leaves(out) if isinstance(x, Tensor))
        sizes = [x.numel() for x in made if x.untyped_storage().data_ptr() not in held]
        self.elements = max([self.elements, *sizes])
        return out


def test_half_a_million_states_are_searched_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "SCORES_AT_ONCE", 2**14)
    monkeypatch.setattr(retrieval, "GATHERED_AT_ONCE", 2**14)
    states, queries = torch.randn(500_000, 4), torch.randn(6, 4)
    with Largest() as largest:
        found = retrieval.attend(queries, states, lambda q: retrieval.nearest(q, states, 50), 50)
    weights, best = (queries @ states.T).topk(50)
    torch.testing.assert_close(found, torch.einsum("qk,qkd->qd", weights.softmax(-1), states[best]))
    assert largest.elements <= 2**14


def test_a_long_input_costs_a_state_a_token_and_no_more() -> None:
    """No tensor of reading and answering is larger than the store, and the decoder's cache does not grow with the input."""
    model, sizes = ls.apply(build("bart"), "unlimiformer:batch=4"), []
    for n in (1000, 2000):
        ids = text(1, n)
        with Largest() as largest:
            out = model.generate(ids, max_new_tokens=3, num_beams=3, return_dict_in_generate=True)
        store = n * 32
        assert largest.elements <= store
        caches = (out.past_key_values.self_attention_cache, out.past_key_values.cross_attention_cache)
        sizes.append(sum(layer.keys.numel() + layer.values.numel() for cache in caches for layer in cache.layers))
    assert sizes[0] == sizes[1]


# Search.


@pytest.mark.parametrize("limit", [1, 64, 1000, 2**26])
def test_nearest_is_topk(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(retrieval, "SCORES_AT_ONCE", limit)
    queries, states = torch.randn(7, 5), torch.randn(90, 5)
    for k in (1, 8, 90):
        assert torch.equal(retrieval.nearest(queries, states, k), (queries @ states.T).topk(k).indices)


@pytest.mark.parametrize("search", ["faiss", "ivf"])
def test_faiss(search: str) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is optional: pip install 'longspan[knn]'")
    torch.manual_seed(0)
    states, queries = torch.randn(4000, 32), torch.randn(9, 32)
    exact = retrieval.nearest(queries, states, 20)
    found = retrieval.FaissIndex(states, search, 8)(queries, 20)
    recall = sum(len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)) / exact.numel()
    assert recall == 1 if search == "faiss" else 0.4 < recall < 1
    model, ids, asked = build("bart"), text(1, 600), text(1, 4, seed=1)
    with torch.no_grad():
        exact, ours = (
            ls.apply(model, f"unlimiformer:search={name}")(input_ids=ids, decoder_input_ids=asked).logits
            for name in ("torch", search)
        )
    assert torch.isfinite(ours).all()
    if search == "faiss":
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_empty_places_of_a_search_are_not_attended_to() -> None:
    states, queries = torch.randn(20, 4), torch.randn(3, 4)
    picks = torch.tensor([[3, 5, -1], [0, -1, -1], [1, 2, 7]])
    out = retrieval.attend(queries, states, lambda q: picks, 3)
    some = states[[3, 5]]
    torch.testing.assert_close(out[0], (queries[0] @ some.T).softmax(-1) @ some)
    torch.testing.assert_close(out[1], states[0])


# Training.


def loss_of(model: PreTrainedModel, n: int = 60) -> Tensor:
    return model(input_ids=text(2, n), labels=text(2, 5, seed=1)).loss


def grads_of(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@each_family
@pytest.mark.parametrize("training", ["random", "retrieval", "alternating"])
def test_gradients_reach_the_encoder(family: str, training: str) -> None:
    model = ls.apply(build(family), f"unlimiformer:k=9,training={training}").train()
    grads = grads_of(model)
    encoder = dict(model.get_encoder().named_parameters())
    assert all(grads[name].abs().sum() > 0 for name in grads if "encoder.layers" in name and "weight" in name)
    assert encoder and sum("encoder." in name for name in grads) > 10


@each_family
def test_gradients_are_those_of_full_cross_attention_where_everything_is_retrieved(family: str) -> None:
    """Through the encoding that is computed again, and through transformers' own checkpoints."""
    model, ids, labels = build(family, torch.float64).train(), text(2, 60), text(2, 5, seed=1)
    states = torch.stack([states_by_hand(model, row) for row in ids])
    model(encoder_outputs=BaseModelOutput(last_hidden_state=states), labels=labels).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    ls.apply(model, "unlimiformer:k=60,training=retrieval")
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got = grads_of(model)
        for name, grad in want.items():
            if name in got:
                torch.testing.assert_close(got[name], grad, rtol=1e-6, atol=1e-9)
            else:
                assert name.endswith("encoder_attn.k_proj.bias")


def test_checkpoints_that_lose_the_states_are_refused() -> None:
    model = ls.apply(build("bart"), "unlimiformer:training=retrieval").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(NotSupported, match="use_reentrant"):
        loss_of(model).backward()


def test_random_training_draws_and_evaluation_does_not() -> None:
    model = ls.apply(build("bart"), "unlimiformer:k=9,training=random")
    with torch.no_grad():
        still = {loss_of(model).item() for _ in range(2)}
        drawn = {loss_of(model.train()).item() for _ in range(4)}
        torch.manual_seed(5)
        first = loss_of(model).item()
        torch.manual_seed(5)
        again = loss_of(model).item()
        short = {loss_of(model, 9).item() for _ in range(2)}
    assert len(still) == 1 and len(drawn) == 4 and first == again and len(short) == 1


def test_random_training_attends_to_k_states_of_the_text() -> None:
    """One layer's answer is full cross-attention over the states that were drawn, the same for all heads."""
    model = ls.apply(build("bart", torch.float64), "unlimiformer:k=9,training=random")
    module, states = cross_modules(model)[0], torch.randn(50, 32, dtype=torch.float64)
    hidden = torch.randn(1, 3, 32, dtype=torch.float64)
    torch.manual_seed(1)
    drawn = torch.randperm(50)[:9]
    torch.manual_seed(1)
    given = encoder_decoder.attach(hidden.new_zeros(1, 1, 32), Given(Encoded([states]), "random"))
    torch.testing.assert_close(
        module(hidden, key_value_states=given)[0], by_the_formula(module, hidden, states[drawn], 9)
    )


def test_alternating_training_takes_turns_and_retrieves_first() -> None:
    model = build("bart").train()
    with torch.no_grad():
        best = loss_of(ls.apply(model, "unlimiformer:k=9,training=retrieval")).item()
        ls.apply(model, "unlimiformer:k=9,training=alternating")
        losses = [loss_of(model).item() for _ in range(6)]
    assert losses[::2] == [best] * 3
    assert len({*losses[1::2], best}) == 4


def test_test_time_only_trains_as_the_plain_model() -> None:
    model = build("bart").train()
    plain = loss_of(model, WINDOW)
    ls.apply(model, "unlimiformer")
    torch.testing.assert_close(loss_of(model, WINDOW), plain)
    with pytest.raises(NotSupported, match="test time"):
        loss_of(model, WINDOW + 1)


# A text that is kept.


@each_family
def test_a_text_is_read_once_and_asked_often(family: str, tmp_path: Path) -> None:
    model, ids = ls.apply(build(family), "unlimiformer:k=20"), text(2, 70)
    want = model.generate(ids, max_new_tokens=6, num_beams=2)
    Encoded.of(model, ids).save(tmp_path / "text.safetensors", model)
    kept = ls.Encoded.load(tmp_path / "text.safetensors", model)
    calls: list[Any] = []
    model.get_encoder().register_forward_hook(lambda *call: calls.append(call))
    for _ in range(2):
        assert torch.equal(model.generate(encoder_outputs=kept.outputs(), max_new_tokens=6, num_beams=2), want)
    asked = text(2, 4, seed=1)
    with torch.no_grad():
        again = model(encoder_outputs=kept.outputs(), decoder_input_ids=asked).logits
        assert not calls
        torch.testing.assert_close(again, model(input_ids=ids, decoder_input_ids=asked).logits)


def test_joined_texts_are_attended_to_together(tmp_path: Path) -> None:
    model, book, asked = ls.apply(build("bart"), "unlimiformer:k=100"), text(1, 40), text(2, 4, seed=1)
    questions = text(2, 7, seed=2)
    one, two = Encoded.of(model, book), Encoded.of(model, questions)
    assert [len(row) for row in (one + two).rows] == [47, 47]
    with torch.no_grad():
        a = model(encoder_outputs=(one + two).outputs(), decoder_input_ids=asked).logits
        b = model(encoder_outputs=(two + one).outputs(), decoder_input_ids=asked).logits
        alone = model(encoder_outputs=(two + two).outputs(), decoder_input_ids=asked).logits
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (a - alone).abs().max() > 1e-3
    with pytest.raises(LongspanError, match="3 and 2"):
        Encoded(one.rows * 3) + two


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = ls.apply(build("bart"), "unlimiformer")
    path = tmp_path / "text.safetensors"
    Encoded.of(model, text(1, 40)).save(path, model)
    with pytest.raises(LongspanError, match="another encoder"):
        Encoded.load(path, build("led"))
    with torch.no_grad():
        next(iter(model.get_encoder().layers.parameters())).add_(1)
    with pytest.raises(LongspanError, match="another encoder"):
        Encoded.load(path, model)
    with pytest.raises(LongspanError, match="cannot be read"):
        Encoded.load(tmp_path / "none.safetensors", model)
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(LongspanError, match="cannot be read"):
        Encoded.load(tmp_path / "no.safetensors", model)
    build("bart").save_pretrained(tmp_path / "model")
    with pytest.raises(LongspanError, match="no encoder states"):
        Encoded.load(tmp_path / "model" / "model.safetensors", model)


# On the model and off it.


@each_family
def test_short_inputs_stay_and_nothing_stays(family: str) -> None:
    model, asked = build(family), text(2, 6, seed=1)
    config, keys = model.config.to_dict(), list(model.state_dict())
    modules = {name: m.__dict__.keys() - {"training"} for name, m in model.named_modules()}
    short = text(2, WINDOW)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(input_ids=short, decoder_input_ids=asked).logits

    before = logits()
    with ls.applied(model, "unlimiformer"):
        torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-5)
        assert model.config.longspan == {"method": f"unlimiformer:k={WINDOW},window={WINDOW}"}
        assert list(model.state_dict()) == keys
        with ls.applied(model, "unlimiformer:k=3"):
            assert (logits() - before).abs().max() > 1e-3
        torch.testing.assert_close(logits(), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(), before) and model.config.to_dict() == config
    assert {name: m.__dict__.keys() - {"training"} for name, m in model.named_modules()} == modules


@each_family
def test_a_copy_has_the_method_on_it(family: str) -> None:
    """It runs by itself, on weights of its own, and comes back to the plain model."""
    model, ids, asked = build(family), text(1, 40), text(1, 6, seed=1)
    short = text(1, WINDOW)

    def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=asked, use_cache=False).logits

    plain = logits(model, short)
    ls.apply(model, "unlimiformer:k=3")
    changed = logits(model, ids)
    twin = copy.deepcopy(model)
    ls.remove(model)
    assert torch.equal(logits(model, short), plain)
    assert torch.equal(logits(twin, ids), changed)
    assert torch.equal(logits(copy.deepcopy(twin), ids), changed)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
        for module in cross_modules(model):
            parts(module)[1].weight.zero_()
    assert torch.equal(logits(twin, ids), changed), "the copy asks the original"
    ls.remove(twin)
    assert current(twin) is None and torch.equal(logits(twin, short), plain)
    assert all(vars(m).keys() == vars(n).keys() for m, n in zip(twin.modules(), build(family).modules(), strict=True))


# In several hands.


@each_family
def test_threads_share_a_model(family: str) -> None:
    """Each has a text and a length of its own; some read, some ask a text that was read."""
    model = ls.apply(build(family), "unlimiformer:k=5,batch=2")
    books = [Encoded.of(model, text(1, 30 + 5 * n, seed=n)) for n in range(THREADS)]

    def answer(number: int) -> Tensor:
        how = {"max_new_tokens": 5, "num_beams": 1 + number % 2, "no_repeat_ngram_size": 1, "min_new_tokens": 5}
        read = model.generate(text(2, 30 + 9 * number, seed=10 + number), **how)
        return torch.cat((read, model.generate(encoder_outputs=books[number].outputs(), **how)))

    assert_threads_get_what_each_gets_alone(answer)


@each_family
@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_a_forward_in_the_midst_of_another(family: str, where: str) -> None:
    model = ls.apply(build(family), "unlimiformer:k=5")
    layer = next(m for name, m in model.get_encoder().named_modules() if name.endswith(("layers.0", "block.0")))
    module = layer if where == "encoder" else parts(cross_modules(model)[0])[0]

    @torch.no_grad()
    def logits(seed: int) -> Tensor:
        return model(input_ids=text(1, 40 + seed, seed=seed), decoder_input_ids=text(1, 5, seed=7)).logits

    assert torch.equal(in_the_midst(module, lambda: logits(1), lambda: logits(2)), logits(1))
    assert not torch.equal(logits(1), logits(2))


@each_family
@pytest.mark.parametrize("training", ["retrieval", "random", "alternating"])
def test_checkpoints_after_another_forward(family: str, training: str) -> None:
    model = build(family, torch.float64).train()
    losses = [
        lambda n=n: model(input_ids=text(2, 40 + 9 * n, seed=n), labels=text(2, 5 + n, seed=1)).loss for n in (0, 1)
    ]
    ls.apply(model, f"unlimiformer:k=7,training={training}")
    assert_checkpoints_change_no_gradient(model, *losses)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_under_any_attention_of_the_models_own(family: str, attention: str) -> None:
    model, ids, asked = build(family), text(1, 50), text(1, 4, seed=1)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        states = states_by_hand(model, ids[0])[None]
        full = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=asked).logits
        ls.apply(model, "unlimiformer:k=50")
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=asked).logits, full, rtol=1e-4, atol=1e-5)


@each_family
def test_bfloat16(family: str) -> None:
    model, ids, asked = build(family), text(1, 60), text(1, 4, seed=1)
    with torch.no_grad():
        want = ls.apply(model, "unlimiformer")(input_ids=ids, decoder_input_ids=asked).logits
        ls.remove(model)
        model.to(torch.bfloat16)
        got = ls.apply(model, "unlimiformer")(input_ids=ids, decoder_input_ids=asked).logits
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).norm() / want.norm()).item() < 0.1


def test_facts_of_encoder_decoders() -> None:
    for family, layers in itertools.product(CONFIGS, (2,)):
        for given in (build(family), CONFIGS[family]()):
            facts = facts_of(given)
            assert facts.encoder_decoder and facts.window == WINDOW and facts.layers == layers and facts.heads == 4
    assert facts_of(T5Config(**{k: v for k, v in T5.items() if k != "n_positions"})).window == 512


@each_family
@pytest.mark.parametrize("method", ["yarn:factor=4", "streaming", "window:size=9", "unlimiformer + logn", "alibi"])
def test_other_methods_refuse_encoder_decoders(family: str, method: str) -> None:
    model = build(family)
    with pytest.raises(NotSupported, match="use unlimiformer"):
        ls.apply(model, method)
    assert ls.apply(model, "none") is model


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    with pytest.raises(NotSupported, match="decoder alone"):
        ls.apply(llama, "unlimiformer")
    with pytest.raises(NotSupported, match="window=16 or less"):
        ls.apply(build("bart"), "unlimiformer:window=32")
    assert ls.apply(build("t5"), "unlimiformer:window=32").config.longspan
    build("bart").save_pretrained(tmp_path / "bart")
    with pytest.raises(NotSupported, match="has an encoder, and longspan loads"):
        ls.load(tmp_path / "bart")
    for bad in (
        "k=0",
        "window=3",
        "overlap=1",
        "batch=0",
        "probes=3",
        "search=faiss,training=retrieval",
        "training=some",
    ):
        with pytest.raises(SpecError):
            ls.apply(build("bart"), f"unlimiformer:{bad}")


IDS, ASKED = text(2, 40), text(2, 4, seed=1)
HOLE = torch.arange(40).ne(20).long().expand(2, -1)
LOST = BaseModelOutput(last_hidden_state=torch.full((2, 1, 32), float("nan")))
IMPOSSIBLE: dict[str, Callable[[PreTrainedModel], Any]] = {
    "not tokens within": lambda m: m(input_ids=IDS, attention_mask=HOLE, decoder_input_ids=ASKED),
    "only padding": lambda m: m(input_ids=IDS, attention_mask=0 * HOLE, decoder_input_ids=ASKED),
    "no other mask": lambda m: m.get_encoder()(input_ids=IDS, attention_mask=HOLE[:, None]),
    "last layer's states": lambda m: m(input_ids=IDS, decoder_input_ids=ASKED, output_hidden_states=True),
    "lost the states": lambda m: m(encoder_outputs=LOST, decoder_input_ids=ASKED),
    "have lost the states": lambda m: m.get_decoder()(
        input_ids=text(3, 4), encoder_hidden_states=m.get_encoder()(input_ids=IDS)[0][[0, 0, 1]]
    ),
    "evenly": lambda m: m.get_decoder()(
        input_ids=text(3, 4),
        encoder_hidden_states=encoder_decoder.attach(
            encoder_decoder.stand_in(3, torch.zeros(1, 32)), Encoded.of(m, IDS)
        ),
    ),
}


@pytest.mark.parametrize("reason", IMPOSSIBLE)
def test_calls_that_cannot_work_are_refused(reason: str) -> None:
    with pytest.raises(NotSupported, match=reason):
        IMPOSSIBLE[reason](ls.apply(build("bart"), "unlimiformer"))


def test_an_adapter_on_the_projections_is_refused() -> None:
    class Adapter(nn.Linear):
        pass

    model = ls.apply(build("bart"), "unlimiformer")
    cross_modules(model)[0].k_proj = Adapter(32, 32)
    with pytest.raises(NotSupported, match="merge the adapter"):
        model(input_ids=text(1, 40), decoder_input_ids=text(1, 4))
