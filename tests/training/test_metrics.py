"""Operations of a training are those of the pairs that are seen."""

from __future__ import annotations

from typing import Any

import pytest

from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.training.metrics import work

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def attention(**settings: Any) -> float:
    return work(LongspanForCausalLM(LongspanConfig(**SIZES, **settings)), 64).attention


def test_a_window_counts_the_pairs_that_it_shows() -> None:
    pairs = sum(min(8, query + 1) for query in range(64))
    assert attention(attention="window:size=8") == pytest.approx(4 * 12 * 32 * pairs / 64)
    assert attention() == pytest.approx(4 * 12 * 32 * 65 / 2)


def test_each_layer_counts_its_own() -> None:
    mixed = attention(attention=["window:size=8", "full"])
    assert mixed == pytest.approx((attention(attention="window:size=8") + attention()) / 2)


def test_a_mixer_scores_no_pairs() -> None:
    assert attention(attention="linear", position="nope") == 0


@pytest.mark.parametrize("tied", [True, False])
def test_logits_count_where_labels_are(tied: bool) -> None:
    model = LongspanForCausalLM(LongspanConfig(**SIZES, tie_word_embeddings=tied))
    assert work(model, 64).products - work(model, 64, 0.25).products == pytest.approx(0.75 * 6 * 40 * 32)
