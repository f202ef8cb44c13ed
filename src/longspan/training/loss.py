"""The loss of next tokens, with logits of a few positions at a time.

Vocabulary × length logits are what a long sample's memory goes to. Here the decoder runs once, and its states go through the
output matrix chunk by chunk; each chunk's logits are made again in the backward pass. Where few places have a label, as in a
task's samples, the others' states are left out. The result is that of all at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from longspan.hf.heads import plain_head
from longspan.training.samples import IGNORE
from longspan.util.errors import NotSupported


class NextToken(nn.Module):
    """A model with its loss as one module, so that the distributed wrappers of torch see the whole step.

    model: what trains, a causal model or peft's wrapper around one. chunk: how many positions' logits are held at once; None
    for all. Raises `NotSupported` for a chunk where the model does more to its logits than the output matrix.
    """

    accepts_loss_kwargs = True
    """Tells the Trainer to count the batch's labels and hand the number over."""

    def __init__(self, model: nn.Module, chunk: int | None):
        super().__init__()
        self.model = model
        self.chunk = chunk
        if chunk is not None:
            _requireplain_head(self.causal)

    @property
    def causal(self) -> PreTrainedModel:
        """The causal model itself, without an adapter's wrapper."""
        return causal_model(self.model)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        labelled: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """All (B, T); labels[t] is the token after input_ids[t], or -100. labelled (places,): where the labels are in the batch
        as one row, as `samples.collate` gives it: to find out here would wait for the device. `loss` is the mean over the labels,
        or the sum over num_items_in_batch; `sums` and `counts` (B,) are each sequence's sum of losses and number of labels."""
        losses = self._losses(input_ids, labels, labelled, inputs)
        counts = (labels != IGNORE).sum(1)
        total = counts.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / total, "sums": losses.detach().sum(1), "counts": counts}

    def _losses(self, input_ids: Tensor, labels: Tensor, labelled: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """(B, T) in float32, 0 where there is no label."""
        if self.chunk is None:
            logits = self.causal(input_ids=input_ids, use_cache=False, **inputs).logits
            return _cross_entropy(logits.flatten(0, 1), labels.flatten()).view_as(labels)
        states = self.causal.base_model(input_ids=input_ids, use_cache=False, **inputs)[0]
        head = self.causal.get_output_embeddings()
        rows, targets = states.flatten(0, 1), labels.flatten()
        if labelled is not None:  # none at all goes through the matrix too: data parallel waits for its gradient
            rows, targets = rows.index_select(0, labelled), targets.index_select(0, labelled)
        pairs = list(zip(rows.split(self.chunk), targets.split(self.chunk), strict=True))
        again = torch.is_grad_enabled() and len(pairs) > 1
        found = torch.cat([_chunk_losses(head, r, t, again) for r, t in pairs])
        if labelled is not None:
            found = found.new_zeros(labels.numel()).index_copy(0, labelled, found)
        return found.view_as(labels)


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The causal model itself, out of an adapter's wrapper where there is one."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]


def _chunk_losses(head: nn.Module, states: Tensor, labels: Tensor, again: bool) -> Tensor:
    """(rows,) losses of states (rows, hidden); `again` makes the logits a second time in the backward pass."""

    def losses(states: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(head(states), labels)

    return checkpoint(losses, states, labels, use_reentrant=False) if again else losses(states, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def _requireplain_head(model: PreTrainedModel) -> None:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = plain_head(model) is not None
    finally:
        model.train(training)
    if not plain:
        raise NotSupported(
            f"training.loss_chunk: {type(model).__name__} does more to its logits than its output matrix (a cap or a scale), so "
            "they cannot be made in chunks; use training.loss_chunk=none"
        )
