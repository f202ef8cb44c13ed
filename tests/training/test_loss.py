"""The loss in chunks is the loss, forward and backward; and what a jump of positions must not do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

import tiny
from longspan.training import build
from longspan.training.loss import NextToken
from longspan.training.proofs import prove_boundaries, prove_jump
from longspan.util.errors import NotSupported

SIZES = [1, 5, 7, 24, 100]


def batch(rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(5, 200, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    labels = ids[:, 1:].clone()
    labels[0, 4:6] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


@pytest.mark.parametrize("chunk", SIZES)
def test_chunks_give_the_loss_and_the_gradients_of_all_logits_at_once(chunk: int) -> None:
    plain, chunked = (NextToken(tiny.model().double().train(), c) for c in (None, chunk))
    losses = [m(**batch())["loss"] for m in (plain, chunked)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=0)
    for loss in losses:
        loss.backward()
    for (name, one), two in zip(plain.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-9, msg=name)


def few(labels: int) -> dict[str, Tensor]:
    """A batch with so many labels, and where they are."""
    data = batch()
    keep = torch.randperm(24, generator=torch.Generator().manual_seed(2))[:labels].sort().values
    data["labels"] = torch.full((24,), -100).index_copy(0, keep, data["input_ids"].flatten()[keep]).view(2, 12)
    return {**data, "labelled": keep}


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("labels", [0, 1, 7])
def test_logits_are_made_where_labels_are(labels: int, chunk: int) -> None:
    """The same loss, sums, counts and gradients; with no label at all every parameter still has a gradient, of zeros, which
    data parallel waits for."""
    plain, short = (NextToken(tiny.model().double().train(), chunk) for _ in range(2))
    rows: list[int] = []
    short.causal.lm_head.register_forward_hook(lambda m, given, made: rows.append(len(given[0])))
    data = few(labels)
    before = plain(**{k: v for k, v in data.items() if k != "labelled"}, num_items_in_batch=7)
    after = short(**data, num_items_in_batch=7)
    assert sum(rows) == labels
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-7, atol=0)
    for made in (before, after):
        made["loss"].backward()
    for (name, one), two in zip(plain.named_parameters(), short.parameters(), strict=True):
        assert two.grad is not None
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-9, msg=name)


def test_it_is_the_loss_that_transformers_computes() -> None:
    model, data = tiny.model(), batch()
    theirs = model(input_ids=data["input_ids"], labels=data["input_ids"], shift_labels=data["labels"]).loss
    torch.testing.assert_close(NextToken(model, 5)(**data)["loss"], theirs)


def test_sums_and_counts_belong_to_sequences_and_micro_batches_add_up() -> None:
    module, data = NextToken(tiny.model(), 5), batch()
    whole = module(**data)
    assert whole["counts"].tolist() == [10, 12]
    torch.testing.assert_close(whole["sums"].sum() / 22, whole["loss"])
    halves = [module(**{k: v[i : i + 1] for k, v in data.items()}, num_items_in_batch=22)["loss"] for i in (0, 1)]
    torch.testing.assert_close(halves[0] + halves[1], whole["loss"])


def test_a_capped_head_is_refused_in_chunks_and_right_without() -> None:
    config = Gemma2Config(
        **tiny.sizes(264, 32, 48, 2, 2, 1),
        head_dim=16,
        final_logit_softcapping=0.1,
    )
    model, data = Gemma2ForCausalLM(config).eval(), batch()
    with pytest.raises(NotSupported, match="loss_chunk=none"):
        NextToken(model, 5)
    theirs = model(input_ids=data["input_ids"], labels=data["input_ids"], shift_labels=data["labels"]).loss
    torch.testing.assert_close(NextToken(model, None)(**data)["loss"], theirs)


# Positions with a jump


def influence(model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> float:
    """The largest gradient of the loss of the last tokens with respect to the embeddings of the first ones."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        seen.append(output)
        return output

    handle = model.get_input_embeddings().register_forward_hook(keep)
    NextToken(model, None)(**inputs)["loss"].backward()
    handle.remove()
    assert seen[-1].grad is not None
    return float(seen[-1].grad[:, :6].abs().max())


def jumped() -> dict[str, Tensor]:
    """Twelve tokens of which the last six stand a hundred places further, and only they have labels."""
    data = batch()
    places = torch.arange(12)
    places[6:] += 100
    data["labels"][:, :6] = -100
    return {**data, "position_ids": places.expand(2, 12)}


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_comes_after_a_jump_learns_from_what_stands_before_it(kind: str, checkpointing: bool) -> None:
    model = tiny.model(window=256).train()
    model.set_attn_implementation(kind)
    if checkpointing:
        build.checkpoint_activations(model)
    inputs = jumped()
    assert influence(model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}) > 1e-5


def test_checkpointing_gives_the_same_gradients_across_a_jump() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny.model(window=256).train()
        if checkpointing:
            build.checkpoint_activations(model)
        inputs = jumped()
        NextToken(model, 5)(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))["loss"].backward()
        grads.append(copy.deepcopy([p.grad for p in model.parameters()]))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_a_model_is_tried_before_the_first_step() -> None:
    model = tiny.model(window=256)
    prove_jump(model)
    prove_boundaries(model)


def _forget(model: LlamaForCausalLM, change: Callable[[dict], dict]) -> None:
    """Has every forward of the decoder see other arguments."""
    model.base_model.register_forward_pre_hook(lambda m, a, k: (a, change(k)), with_kwargs=True)


def test_a_model_that_takes_a_jump_for_another_document_is_refused() -> None:
    model = tiny.model(window=256)
    _forget(model, lambda given: {k: v for k, v in given.items() if k != "attention_mask"})
    with pytest.raises(NotSupported, match="the start of another document"):
        prove_jump(model)


def test_a_model_that_mixes_documents_is_refused() -> None:
    model = tiny.model(window=256)
    _forget(model, lambda given: {**given, "attention_mask": torch.ones_like(given["position_ids"])})
    with pytest.raises(NotSupported, match="attends to the document before"):
        prove_boundaries(model)
