"""The rotary angles of any architecture, and rotation by them with that architecture's own function.

Layouts differ (half-split or interleaved pairs, whole or part of the head), and each architecture's
`apply_rotary_pos_emb` knows its own; so the angles come from its rotary module and the rotation from that function.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn


class Rotary:
    """Angles of one rotary module. Angles are computed in float32 and hold to about a million positions."""

    def __init__(self, module: nn.Module):
        self.module = module

    def tables(self, positions: Tensor, like: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B, T, rotated channels), for `positions` (B, T), in the dtype and on the device of `like`,
        with the attention factor that scaled models carry in them."""
        at = _in_its_form(self.module, positions)
        return self.module(like, at) if layer_type is None else self.module(like, at, layer_type)

    def with_frequencies(self, inverse: list[float], layer_type: str | None = None) -> Rotary:
        """The same with other inverse frequencies, for layers of full attention; this one's module stays as it is."""
        if layer_type not in (None, "full_attention"):
            return self
        module = copy.copy(self.module)
        module._buffers = dict(self.module._buffers)
        name = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
        held = getattr(module, name)
        setattr(module, name, torch.tensor(inverse, dtype=held.dtype, device=held.device))
        return Rotary(module)

    def shift_tables(self, shift: Tensor, like: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """The same for moving what is rotated already: rotations add up, the attention factor must not be taken twice."""
        cos, sin = self.tables(shift, like, layer_type)
        prefix = f"{layer_type}_" if layer_type else ""
        factor = getattr(self.module, f"{prefix}attention_scaling", 1.0)
        return (cos, sin) if factor == 1.0 else (cos / factor, sin / factor)


def angles(module: nn.Module, positions: Tensor) -> Tensor:
    """cos and sin (2, B, T, channels) of a rotary module in float32, of all its kinds of layers side by side. Llama 4's gives
    complex numbers."""
    device = next(module.buffers()).device
    like, at = torch.zeros(1, device=device), _in_its_form(module, positions.to(device))
    kinds: Any = module.rope_type
    made = [module(like, at, kind) for kind in kinds] if isinstance(kinds, dict) else [module(like, at)]
    pairs = [torch.stack(x) if isinstance(x, tuple) else torch.view_as_real(x).movedim(-1, 0) for x in made]
    return torch.cat(pairs, dim=-1)


def _in_its_form(module: nn.Module, positions: Tensor) -> Tensor:
    """positions (B, T) as a rotary module takes them: Qwen-VL's in time, height and width, (3, B, T), here all the same."""
    settings = getattr(module.config, "rope_parameters", None) or {}
    return positions[None].expand(3, -1, -1) if "mrope_section" in settings else positions


def rotate(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) rotated by cos and sin (B, T, W) as `module`'s architecture rotates its queries and keys.

    module: an attention layer. The first W channels are rotated, the others pass. Layers without positions (SmolLM3's) return x.
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
    """A copy of a rotary module whose angles are all zero (cos 1, sin 0), so that rotation by it changes nothing."""
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
