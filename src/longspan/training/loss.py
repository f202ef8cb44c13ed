"""The next-token loss, with the logits of a few positions in memory at a time.

The logits, vocabulary × length numbers, take most of a long sample's memory. The decoder runs once, and its states go through the
output matrix in chunks, whose logits are recomputed in the backward pass. Positions without a label, most of them in a task's
samples, are left out. The loss equals that of all logits at once.
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
    """A model with its loss as one module, so that torch's distributed wrappers contain the whole step.

    model: a causal model, or peft's wrapper around one. chunk: positions whose logits are in memory at once; None for all.
    Raises `NotSupported` for a chunk where the logits are not the output matrix's product alone.
    """

    accepts_loss_kwargs = True
    """Has the Trainer count the batch's labels and pass the number to `forward`."""

    def __init__(self, model: nn.Module, chunk: int | None):
        super().__init__()
        self.model = model
        self.chunk = chunk
        if chunk is not None:
            _require_plain_head(self.causal)

    @property
    def causal(self) -> PreTrainedModel:
        """The causal model inside an adapter's wrapper."""
        return causal_model(self.model)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        labelled: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """The `loss`, and each sequence's sum of losses and number of labels, `sums` and `counts` (B,).

        input_ids, labels (B, T): labels[t] is the token after input_ids[t], or -100. labelled (places,): the places of the labels
        in the flattened batch, from `samples.collate`, since finding them here would wait for the device. The loss is the mean
        over the labels, or their sum divided by num_items_in_batch.
        """
        losses = self._losses(input_ids, labels, labelled, inputs)
        counts = (labels != IGNORE).sum(1)
        total = counts.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / total, "sums": losses.detach().sum(1), "counts": counts}

    def _losses(self, input_ids: Tensor, labels: Tensor, labelled: Tensor | None, inputs: dict[str, Any]) -> Tensor:
        """Losses (B, T) in float32, 0 without a label."""
        if self.chunk is None:
            logits = self.causal(input_ids=input_ids, use_cache=False, **inputs).logits
            return _cross_entropy(logits.flatten(0, 1), labels.flatten()).view_as(labels)
        states = self.causal.base_model(input_ids=input_ids, use_cache=False, **inputs)[0]
        head = self.causal.get_output_embeddings()
        rows, targets = states.flatten(0, 1), labels.flatten()
        if labelled is not None:  # also where it is empty: data parallelism waits for the matrix's gradient
            rows, targets = rows.index_select(0, labelled), targets.index_select(0, labelled)
        pairs = list(zip(rows.split(self.chunk), targets.split(self.chunk), strict=True))
        again = torch.is_grad_enabled() and len(pairs) > 1
        found = torch.cat([_chunk_losses(head, r, t, again) for r, t in pairs])
        if labelled is not None:
            found = found.new_zeros(labels.numel()).index_copy(0, labelled, found)
        return found.view_as(labels)


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The causal model, also inside an adapter's wrapper."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]


def _chunk_losses(head: nn.Module, states: Tensor, labels: Tensor, again: bool) -> Tensor:
    """Losses (rows,) of states (rows, hidden); with `again` the backward pass recomputes the logits."""

    def losses(states: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(head(states), labels)

    return checkpoint(losses, states, labels, use_reentrant=False) if again else losses(states, labels)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def _require_plain_head(model: PreTrainedModel) -> None:
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
            "they cannot be computed in chunks; use training.loss_chunk=none"
        )
