"""What the parts of gist tokens know of the method: its settings, and whether it is on a model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from longspan.hf.site import current
from longspan.util.errors import NotSupported

TOKEN = "<GIST>"


def method_on(model: PreTrainedModel) -> Any:
    """The gist that is on a model. Raises `NotSupported` where there is none."""
    methods = current(model)
    found = next((m for m in methods.methods if m.name == "gist"), None) if methods else None
    if found is None:
        raise NotSupported(
            "this model has no gist tokens: load one that was trained with them, or "
            'longspan.apply(model, "gist", tokenizer=tokenizer)'
        )
    return found
