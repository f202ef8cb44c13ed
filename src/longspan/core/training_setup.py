"""What a method may know of a training that it takes part in: the parts of a recipe that decide whether it can be learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingSetup:
    """A recipe as `Method.check_training` sees it.

    steps: updates of the weights. length: tokens of a sample. batch: sequences of one forward on one device. texts: the recipe's
    keys (`data.train`, …) that name a text and not a task, each with the text's name.
    """

    steps: int
    length: int
    batch: int
    packing: Literal["plain", "boundaries", "none"]
    positions: Literal["ordinary", "pose"]
    lora: bool
    from_scratch: bool
    """Whether the recipe builds the model from a configuration, so that its `model.` keys can be changed."""
    texts: Mapping[str, str]
    task: str | None
    """The task that is mixed into the text (`data.task`)."""
