"""Queries and keys of large biases, as Qwen2's, in 16 bits: no method is farther from float32 than its own arithmetic must be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from longspan.apply import applied
from longspan.engine.slices import Slices
from longspan.hf import compat
from longspan.hf.call import LayerCall
from longspan.positions.near_far import NearFar

CASES = [(torch.float16, 300), (torch.float16, 100), (torch.bfloat16, 60)]
in_16_bits = pytest.mark.parametrize(("dtype", "bias"), CASES, ids=["float16-300", "float16-100", "bfloat16-60"])


def pair(dtype: torch.dtype, bias: float) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in 16 bits whose scores go to 10⁵ and more, and the same weights in float32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=96, max_position_embeddings=64)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias.normal_(0, bias)
    model = model.to(dtype)
    exact = Qwen2ForCausalLM(Qwen2Config(**config.to_dict())).eval()
    exact.load_state_dict(model.state_dict())
    return model, exact


def tokens() -> Tensor:
    return torch.randint(3, 96, (8, 40), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def distance(model: PreTrainedModel, exact: PreTrainedModel) -> float:
    """The relative error of a model's logits, whole and from a cache, whichever is greater."""
    ids = tokens()
    whole, expected = model(ids).logits, exact(ids).logits
    first = model(ids[:, :20])
    parts = [first.logits]
    for t in range(20, 40, 5):
        more = model(ids[:, t : t + 5], past_key_values=compat.cache_of(first))
        parts.append(more.logits)
    assert whole.isfinite().all()
    return max(((x.float() - expected).norm() / expected.norm()).item() for x in (whole, torch.cat(parts, dim=1)))


@in_16_bits
@pytest.mark.parametrize(
    "spec", ["self-extend:group=1,window=6", "rerope:window=50", "leaky-rerope:window=6,factor=1", "streaming:window=9"]
)
def test_as_near_as_the_model_itself(dtype: torch.dtype, bias: float, spec: str) -> None:
    """Where nothing is changed, and where only the window is; and the trial at `apply` accepts it."""
    model, exact = pair(dtype, bias)
    own = distance(model, exact)
    with applied(model, spec), applied(exact, spec):
        assert distance(model, exact) < 1.1 * own


@in_16_bits
@pytest.mark.parametrize("spec", ["self-extend:group=4,window=6", "rerope:window=6"])
def test_far_distances(dtype: torch.dtype, bias: float, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far keys that share a distance differ by little more than what 16-bit queries and keys round off, so float32 throughout is
    no judge: both scores and one softmax in float32, over the same queries and keys, are."""
    model, exact = pair(dtype, bias)
    own = distance(model, exact)
    with applied(model, spec), torch.no_grad():
        got, by_steps = model(tokens()).logits, model(tokens()[:, :-1])
        last = model(tokens()[:, -1:], past_key_values=compat.cache_of(by_steps)).logits
        monkeypatch.setattr(NearFar, "_block", _by_the_definition)
        expected = model(tokens()).logits
    for logits, wanted in ((got, expected), (last, expected[:, -1:])):
        assert logits.isfinite().all()
        assert (logits - wanted).float().norm() / wanted.float().norm() < max(own, 1e-3)


def _by_the_definition(
    self: NearFar, call: LayerCall, near: tuple[Slices, Slices], far: tuple[Slices, Slices], values: Slices, start: int
) -> Tensor:
    """In the place of one block, of which there is only one."""
    return self.merged(call, (near[0].x, near[1].x), (far[0].x, far[1].x))
