"""Rotary angles of any architecture, and rotation by that architecture's own function.

Layouts differ (half-split or interleaved pairs, all or some channels of the head). So angles come from the model's rotary module,
and rotation is by its `apply_rotary_pos_emb`.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn


class Rotary:
    """Angles of one rotary module, computed in float32 and exact enough for about a million positions."""

    def __init__(self, module: nn.Module):
        self.module = module

    def tables(self, positions: Tensor, like: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B, T, W) for W rotated channels, at `positions` (B, T).

        They have the dtype and the device of `like`, and include the attention factor of scaled models. layer_type: the kind of
        layer, where angles differ by it.
        """
        at = _in_its_form(self.module, positions)
        return self.module(like, at) if layer_type is None else self.module(like, at, layer_type)

    def with_frequencies(self, inverse: list[float], layer_type: str | None = None) -> Rotary:
        """A copy with other inverse frequencies (W/2) for layers of full attention."""
        if layer_type not in (None, "full_attention"):
            return self
        module = copy.copy(self.module)
        module._buffers = dict(self.module._buffers)
        name = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
        old = getattr(module, name)
        setattr(module, name, torch.tensor(inverse, dtype=old.dtype, device=old.device))
        return Rotary(module)

    def shift_tables(self, shift: Tensor, like: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin) as `tables`, to rotate further by `shift` (B, T) positions what is rotated already: no attention factor."""
        cos, sin = self.tables(shift, like, layer_type)
        prefix = f"{layer_type}_" if layer_type else ""
        factor = getattr(self.module, f"{prefix}attention_scaling", 1.0)
        return (cos, sin) if factor == 1.0 else (cos / factor, sin / factor)


def angles(module: nn.Module, positions: Tensor) -> Tensor:
    """cos and sin (2, B, T, W) of a rotary module at positions (B, T), in float32.

    W are the channels of all its kinds of layers, side by side.
    """
    device = next(module.buffers()).device
    like, at = torch.zeros(1, device=device), _in_its_form(module, positions.to(device))
    kinds: Any = module.rope_type
    tables = [module(like, at, kind) for kind in kinds] if isinstance(kinds, dict) else [module(like, at)]
    # Llama 4's module returns complex numbers.
    pairs = [torch.stack(x) if isinstance(x, tuple) else torch.view_as_real(x).movedim(-1, 0) for x in tables]
    return torch.cat(pairs, dim=-1)


def _in_its_form(module: nn.Module, positions: Tensor) -> Tensor:
    """positions (B, T) as the module takes them: Qwen-VL's in time, height and width, (3, B, T), here all three equal."""
    settings = getattr(module.config, "rope_parameters", None) or {}
    return positions[None].expand(3, -1, -1) if "mrope_section" in settings else positions


def rotate(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) rotated by cos and sin (B, T, W).

    module: an attention layer, whose architecture's rotation is used. The first W channels are rotated, the others pass. Layers
    without positions (SmolLM3's) return x.
    """
    if not getattr(module, "use_rope", True):
        return x
    # Models that compute angles in float32 around 16-bit attention have float32 tables: the result keeps the dtype of x.
    if hasattr(module, "rotate"):  # a model of longspan.lm
        return module.rotate(x, cos, sin).to(x.dtype)  # type: ignore[operator]
    apply_rotary = sys.modules[type(module).__module__].apply_rotary_pos_emb
    width = cos.shape[-1]
    rotated = apply_rotary(x[..., :width], x[:, :0, :, :width], cos, sin)[0].to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)


def unrotated_copy(module: nn.Module) -> nn.Module:
    """A copy of a rotary module whose angles are all 0 (cos 1, sin 0)."""
    still = copy.deepcopy(module)
    for name, buffer in still.named_buffers():
        if name.endswith("inv_freq"):
            buffer.zero_()
    for name in list(vars(still)):
        if name.endswith("attention_scaling"):
            setattr(still, name, 1.0)
    # Types that recompute their frequencies as the context grows would overwrite the zeros.
    kind: Any = still.rope_type
    setattr(still, "rope_type", dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default")  # noqa: B010
    return still
