"""torch.compile for more shapes than torch's own limit of eight.

FlexAttention that is not compiled holds every score, without a warning. So a function is compiled for as many shapes as its
caller allows, and raises (`fullgraph`) where torch would run it uncompiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

LIMIT_OF_ITS_OWN = "recompile_limit" in inspect.signature(torch.compile).parameters
"""Whether torch.compile takes a limit for one function, as from 2.13 on."""


def compiled(
    function: Callable[..., Any], shapes: int, backend: str | Callable = "inductor", own_limit: bool = LIMIT_OF_ITS_OWN
) -> Callable[..., Any]:
    """`function`, compiled anew for each of up to `shapes` shapes.

    own_limit: whether torch.compile takes the limit itself.
    """
    settings: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": backend}
    if own_limit:
        return torch.compile(function, **settings | {"recompile_limit": shapes})
    function_compiled = torch.compile(function, **settings)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=shapes):
            return function_compiled(*args, **kwargs)

    return run
