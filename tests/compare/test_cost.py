"""The meter counts what it says it counts."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tiny as tiny_model
from longspan.compare.planning import cost
from longspan.core.facts import facts_of
from longspan.meter import Meter, cache_bytes, weights_bytes
from longspan.util import environment

MB = 10**6


def test_times_are_medians_and_phases_stay_apart():
    meter = Meter("cpu")
    for pause in (0.02, 0.3, 0.03, 0.02, 0.02):
        with meter.prefill(tokens=10):
            time.sleep(pause)
    for _ in range(2):
        with meter.decode(tokens=4):
            time.sleep(0.04)
    report = meter.report()
    assert 0.02 <= report["prefill_s"] < 0.1
    assert report["prefill_s_quartiles"][0] <= report["prefill_s"] <= report["prefill_s_quartiles"][1]
    assert report["prefill_tokens"] == 10
    assert report["prefill_repeats"] == 5
    assert 0.01 <= report["decode_s_per_token"] < 0.03
    assert report["decode_s_per_token_quartiles"] is None
    assert meter.tokens == 58


def test_what_was_not_measured_is_none():
    report = Meter("cpu").report()
    assert {v for k, v in report.items() if not k.endswith("repeats")} == {None}


def test_a_phase_that_raises_is_not_counted():
    meter = Meter("cpu")
    with pytest.raises(KeyError), meter.prefill(tokens=5):
        raise KeyError
    assert meter.report()["prefill_repeats"] == 0
    assert meter.tokens == 0


def test_turns_of_a_stream_count_as_one_reading():
    meter = Meter("cpu")
    for _ in range(2):
        with meter.together():
            for tokens in (30, 12):
                with meter.prefill(tokens):
                    time.sleep(0.02)
                with meter.decode(3):
                    pass
    with meter.together():
        pass
    report = meter.report()
    assert (report["prefill_repeats"], report["prefill_tokens"], report["decode_repeats"]) == (2, 42, 4)
    assert 0.04 <= report["prefill_s"] < 0.2
    assert meter.tokens == 96


def test_each_phase_has_its_own_peak():
    meter = Meter("cpu")
    with meter.prefill(tokens=1):
        torch.ones(50 * MB)  # 200 MB, gone again when the phase ends
    with meter.decode(tokens=1):
        torch.ones(5 * MB)
    report = meter.report()
    assert 150 * MB < report["peak_prefill_bytes"] - report["peak_decode_bytes"] < 220 * MB


def test_tied_weights_count_once():
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    loose = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False))
    tied = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=True))
    assert weights_bytes(loose) - weights_bytes(tied) == 64 * 32 * 4
    assert weights_bytes(loose) == sum(p.numel() for p in loose.parameters()) * 4


def test_a_cache_is_the_storages_that_it_keeps_alive():
    model = tiny_model.model()
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 40, dtype=torch.long), past_key_values=past)
    full = 40 * facts_of(model).cache_bytes_per_token(torch.float32)
    assert cache_bytes(past) == full
    for layer in past.layers:  # views: the storages are still there
        layer.keys, layer.values = layer.keys[:, :, :10], layer.values[:, :, :10]
    assert cache_bytes(past) == full
    for layer in past.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert cache_bytes(past) == full / 4


def test_a_cache_is_walked_through_lists_dicts_and_objects_but_not_into_the_model():
    class Layer:
        def __init__(self, owner):
            self.keys = torch.zeros(10)
            self.again = self.keys[:5]
            self.blocks = [torch.zeros(20), {"more": torch.zeros(30)}]
            self.owner = owner
            self.itself = self

    class Own:
        layers = None

    past = Own()
    past.layers = [Layer(torch.nn.Linear(100, 100)), Layer(None)]
    meter = Meter("cpu")
    meter.cache(past)
    meter.cache(Own())
    assert meter.report()["cache_bytes"] == 2 * 60 * 4


def test_the_model_is_weighed_where_it_is_given():
    model = tiny_model.model()
    assert Meter("cpu", model).report()["weights_bytes"] == weights_bytes(model)


def test_operations_of_a_prefill_follow_from_its_products():
    facts = facts_of(tiny_model.model())
    pairs = 4 * facts.layers * facts.heads * facts.head_dim * 1000**2 / 2
    assert cost.prefill_flops(facts, 1000) == 2 * facts.parameters * 1000 + pairs


def test_the_machine_is_named_with_its_memory():
    machine = environment.machine(torch.device("cpu"))
    assert machine["device"] == "cpu"
    assert machine["device_name"]
    assert machine["cores"] >= 1
    assert 10**8 < machine["device_memory"] <= machine["host_memory"]
    assert set(environment.versions()) == {"longspan", "torch", "transformers", "python"}
    assert 1e8 < cost.speed(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.cuda
def test_on_cuda_the_peak_is_what_the_allocator_held():
    meter = Meter("cuda")
    with meter.prefill(tokens=1):
        torch.ones(50 * MB, device="cuda")
    with meter.decode(tokens=1):
        torch.ones(5 * MB, device="cuda")
    report = meter.report()
    assert report["peak_prefill_bytes"] - report["peak_decode_bytes"] == pytest.approx(180 * MB, abs=4 * MB)
