"""The attention resolution against its formula, on scores that are known and on models whose scores can be had elsewise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tasks_tiny import llama
from transformers import PreTrainedTokenizerFast

from longspan.apply import applied
from longspan.lm import LongspanConfig, LongspanForCausalLM
from longspan.tasks.resolution import Resolution, mean_scores, resolution
from longspan.util.errors import NotSupported

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model(position: str, **more: object) -> LongspanForCausalLM:
    torch.manual_seed(0)
    return LongspanForCausalLM(
        LongspanConfig(position=position, max_position_embeddings=64, **{**SIZES, **more})
    ).eval()


def test_formula() -> None:
    assert float(resolution(torch.zeros(50))) == 0
    falling = torch.tensor([2.0, 1.0, 0.0])
    e = [math.exp(x) for x in (2, 1, 0)]
    wanted = (e[0] * (e[0] - e[1]) + e[1] * (e[1] - e[2])) / sum(e) ** 2
    assert float(resolution(falling)) == pytest.approx(wanted)
    assert float(resolution(falling + 300)) == pytest.approx(wanted)  # only differences count


@pytest.mark.parametrize(("position", "places"), [("alibi", 40), ("kerple", 40)])
def test_scores_of_a_bias_alone(position: str, places: int) -> None:
    """With keys of zero the mean score is the mean bias of the heads."""
    made = model(position)
    torch.nn.init.zeros_(made.model.layers[0].self_attn.k_proj.weight)
    bias = made.model.place.bias(torch.arange(places)).double().mean(0)
    torch.testing.assert_close(mean_scores(made, list(range(2, 2 + places))), bias.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("position", ["rope", "xpos", "xpos:scale_base=0.1", "nope", "tupe"])
def test_scores_of_a_model(position: str) -> None:
    """Against the definition, from the weights that attention comes from: log weights are scores but for each row's sum."""
    made, ids = model(position), list(range(3, 40))
    got = mean_scores(made, ids)
    layer, seen = made.model.layers[0], {}
    layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: seen.update(q=out))
    layer.self_attn.k_proj.register_forward_hook(lambda m, a, out: seen.update(k=out))
    with torch.no_grad():
        made(torch.tensor([ids]))
    q = seen["q"].view(1, -1, 4, 16).transpose(1, 2)
    k = seen["k"].view(1, -1, 2, 16).transpose(1, 2)
    positions = torch.arange(len(ids))[None]
    if position == "rope":
        cos, sin = made.model.rotary_emb(q, positions)
        q, k = (x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin for x in (q, k))
    place = made.model.place
    rows = []
    for i in range(len(ids)):  # one query at a time: xPos' factors between all pairs would leave the range of a float
        row, keys = place.rotate_qk(
            q[:, :, i : i + 1], k[:, :, : i + 1], positions[:, i : i + 1], positions[:, : i + 1]
        )
        row = row @ keys.repeat_interleave(2, 1).mT / 4 * place.score_scale
        rows.append(torch.nn.functional.pad(row, (0, len(ids) - i - 1)))
    scores = torch.cat(rows, dim=2)
    if position == "tupe":
        scores = scores + place.pair_bias(positions, positions)
    mean = scores.mean(1)[0]
    wanted = torch.stack([mean.diagonal(-n).mean() for n in range(len(ids))]).double()
    assert wanted.isfinite().all()
    torch.testing.assert_close(got, wanted.detach(), atol=1e-5, rtol=1e-5)


def test_the_model_computes_as_before() -> None:
    for made in (model("alibi"), llama()):
        ids = torch.tensor([list(range(2, 30))])
        with torch.no_grad():
            before = made(ids).logits
            mean_scores(made, ids[0].tolist())
            torch.testing.assert_close(made(ids).logits, before, rtol=0, atol=0)


def test_what_cannot_be_seen_is_refused() -> None:
    with pytest.raises(NotSupported, match="every key"):
        mean_scores(model("rope", attention="window:size=8"), [3, 4, 5])
    made = llama()
    with applied(made, "streaming:window=16"), pytest.raises(NotSupported, match="methods that replace attention"):
        mean_scores(made, [3, 4, 5])


def test_as_a_task(tokenizer: PreTrainedTokenizerFast, meter: Any) -> None:
    task = Resolution()
    made = model("alibi", vocab_size=len(tokenizer))
    (sample,) = task.samples(tokenizer, 64, 1, 0)
    outcome = task.run(made, tokenizer, sample, meter)
    assert outcome.score > 0
    assert len(outcome.detail["mean_score"]) == len(outcome.detail["distances"]) == 64
