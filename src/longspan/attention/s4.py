"""S4 and S4D: a linear state space per channel (Gu 2022, arXiv 2111.00396 and 2206.11893).

A text is one convolution, a token one step of a recurrence, and both compute the same. As in the authors' stack a layer is whole:
the state space with a direct path D, GELU, a linear layer and a gated linear unit, without a feed-forward network after it. Their
language model has one after every second layer: `attention=[s4, "s4:mlp=true"]`.

Unlike the authors' code, and like the papers, B is not clipped to 2, and the step is e^x and not softplus. The recurrence knows
the order of tokens, so no position scheme is needed; schemes that add to embeddings can be used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from longspan.engine.state_space.attention import (
    DiagonalRecurrence,
    LowRankRecurrence,
    Modes,
    Recurrence,
    cauchy_kernel,
    convolve,
    normal_plus_low_rank,
    pack,
    starting_poles,
    unpack,
    vandermonde_kernel,
)
from longspan.lm.base import Mixer, MixerCall, MixerModule
from longspan.lm.configuration import LongspanConfig
from longspan.lm.state import MixerState, state_of
from longspan.positions.scheme import PositionEncoding


class StateSpace(nn.Module):
    """The state spaces of one layer's channels, with an output matrix per direction.

    Weights stay float32 in a model of 16 bits, since a small error of a pole grows with every token.
    """

    own_rate: tuple[str, ...] = ("log_step", "log_decay", "turn", "entry")

    def __init__(self, method: StateSpaceMixer, channels: int, directions: int):
        super().__init__()
        modes = method.states // 2
        self.method = method
        self.log_step = nn.Parameter(torch.empty(channels))
        self.log_decay = nn.Parameter(torch.empty(method.systems, modes))
        self.turn = nn.Parameter(torch.empty(method.systems, modes))
        self.entry = nn.Parameter(torch.empty(method.systems, modes, 2))
        self.exit = nn.Parameter(torch.empty(directions, channels, modes, 2))
        self.direct = nn.Parameter(torch.empty(channels))

    def optimizer_settings(self) -> dict[str, dict[str, float]]:
        """The optimizer settings of A, B and Δ by parameter: `lr` where it is set, and no weight decay (Gu 2022, appendix D)."""
        rate = {} if self.method.lr is None else {"lr": self.method.lr}
        return {name: {**rate, "weight_decay": 0.0} for name in self.own_rate}

    def draw_weights(self) -> None:
        """Draws Δ between the two settings, uniform in its logarithm, C and D normal, and A and B by `_draw_system`."""
        low, high = math.log(self.method.dt_min), math.log(self.method.dt_max)
        nn.init.uniform_(self.log_step, low, high)
        nn.init.normal_(self.exit, std=math.sqrt(0.5))
        nn.init.normal_(self.direct)
        self._draw_system()

    def _draw_system(self) -> None:
        raise NotImplementedError

    def recurrence(self, direction: int = 0, memory: MixerState | None = None) -> Recurrence:
        """The system of one direction as a recurrence.

        memory: a cache layer for what is computed once for all tokens.
        """
        raise NotImplementedError

    def kernel(self, direction: int, length: int) -> Tensor:
        """The convolution kernel (channels, length) of one direction."""
        raise NotImplementedError

    def modes(self, direction: int = 0) -> Modes:
        """The modes of one direction's system, (channels, N/2), in float32 or wider."""
        wide = torch.promote_types(self.log_step.dtype, torch.float32)
        poles = torch.complex(-self.log_decay.to(wide).exp(), self.turn.to(wide))
        step, exit = self.log_step.to(wide).exp(), torch.view_as_complex(self.exit[direction].to(wide))
        return Modes(step, self._spread(poles), self._spread(torch.view_as_complex(self.entry.to(wide))), exit)

    def _spread(self, x: Tensor) -> Tensor:
        """x by system as x by channel; neighbouring channels share a system."""
        return x.repeat_interleave(len(self.log_step) // len(x), dim=0)


class DiagonalSpace(StateSpace):
    """The diagonal state spaces of S4D."""

    method: S4D

    def _draw_system(self) -> None:
        start, states = self.method.init, self.method.states
        poles = torch.from_numpy(starting_poles(start, states))
        entry = torch.ones_like(poles)
        if start == "legs":
            entry = torch.from_numpy(normal_plus_low_rank(states)[2])
        init.copy_(self.log_decay, (-poles.real).log().expand_as(self.log_decay))
        init.copy_(self.turn, poles.imag.expand_as(self.turn))
        init.copy_(self.entry, torch.view_as_real(entry).expand_as(self.entry))

    def recurrence(self, direction: int = 0, memory: MixerState | None = None) -> DiagonalRecurrence:
        return DiagonalRecurrence(self.modes(direction), self.method.rule)

    def kernel(self, direction: int, length: int) -> Tensor:
        return vandermonde_kernel(self.recurrence(direction), length)


class LowRankSpace(StateSpace):
    """The state spaces of S4.

    `exit` is C~ = C(I - Ā^L) for L = `length`, so training computes no power of Ā (appendix C.3).
    """

    own_rate = (*StateSpace.own_rate, "low")

    def __init__(self, method: S4, channels: int, directions: int, length: int):
        super().__init__(method, channels, directions)
        self.length = length
        self.low = nn.Parameter(torch.empty_like(self.entry))

    def _draw_system(self) -> None:
        poles, low, entry, _ = (torch.from_numpy(x) for x in normal_plus_low_rank(self.method.states))
        init.copy_(self.log_decay, (-poles.real).log().expand_as(self.log_decay))
        init.copy_(self.turn, poles.imag.expand_as(self.turn))
        init.copy_(self.entry, torch.view_as_real(entry).expand_as(self.entry))
        init.copy_(self.low, torch.view_as_real(low).expand_as(self.low))
        drawn = [m.exit for m in map(self.modes, range(len(self.exit)))]
        truncated = torch.stack([LowRankRecurrence(self.modes()).truncated(c, self.length) for c in drawn])
        init.copy_(self.exit, torch.view_as_real(truncated))

    def modes(self, direction: int = 0) -> Modes:
        modes = super().modes(direction)
        return replace(modes, low=self._spread(torch.view_as_complex(self.low.to(modes.step.dtype))))

    def recurrence(self, direction: int = 0, memory: MixerState | None = None) -> LowRankRecurrence:
        """The recurrence, whose C is computed once and kept in `memory`."""
        modes = self.modes(direction)
        if memory is not None and "exit" in memory.shared:
            return LowRankRecurrence(replace(modes, exit=unpack(memory.shared["exit"])))
        exit = LowRankRecurrence(modes).restored(modes.exit, self.length)
        if memory is not None:
            memory.shared["exit"] = pack(exit)
        return LowRankRecurrence(replace(modes, exit=exit))

    def kernel(self, direction: int, length: int) -> Tensor:
        """The kernel (channels, length), cut from that of `self.length` or of as many doublings as needed."""
        modes, reach = self.modes(direction), self.length
        doubling = LowRankRecurrence(modes)
        while reach < length:
            modes = replace(modes, exit=doubling.doubled(modes.exit, reach))
            reach *= 2
        return cauchy_kernel(modes, reach)[:, :length]


class StateSpaceLayer(MixerModule):
    """State spaces, GELU, a linear layer and a gated linear unit; width: channels."""

    def __init__(self, space: StateSpace, layer_idx: int, width: int, *, causal: bool):
        super().__init__()
        self.ssm = space
        self.layer_idx, self.causal = layer_idx, causal
        self.o_proj = nn.Linear(width, 2 * width)

    def mixed(self, call: MixerCall) -> Tensor:
        real, dtype = call.real, call.hidden.dtype
        with torch.autocast(call.hidden.device.type, enabled=False):  # there is no Fourier transform in bfloat16
            x = call.hidden.mT.to(self.ssm.modes().step.dtype)
            x, order = (x, None) if real is None else _padding_first(x, real)
            mixed = self._mixed(x, real, call.cache) + self.ssm.direct.to(x.dtype)[:, None] * x
            if order is not None:
                mixed = torch.zeros_like(mixed).scatter(2, order, mixed)
            mixed = F.gelu(mixed).mT.to(dtype)
        return F.glu(self.o_proj(mixed), dim=-1)

    def _mixed(self, x: Tensor, real: Tensor | None, cache: Cache | None) -> Tensor:
        """The state spaces' output (B, H, T) for x (B, H, T), in which padding is zero and comes first."""
        length = x.shape[2]
        if cache is not None and self.causal:
            return self._recurrent(x, real, state_of(cache, self.layer_idx))
        reverse = None if self.causal else self.ssm.kernel(1, length)
        return convolve(x, self.ssm.kernel(0, length), reverse)

    def _recurrent(self, x: Tensor, real: Tensor | None, memory: MixerState) -> Tensor:
        """The same output after the state in `memory`, which is updated.

        Padding is no time step.
        """
        length, before = x.shape[2], memory.tensors.get("state")
        recurrence = self.ssm.recurrence(0, memory)
        if before is not None and length == 1:
            state = recurrence.step(before, x[..., 0])
            state = state if real is None else torch.where(real[..., None], state, before)
            memory.keep(1, state=state)
            return recurrence.read(state)[..., None]
        mixed, state = convolve(x, self.ssm.kernel(0, length)), recurrence.advance(x)
        if before is not None:
            answer = recurrence.respond(before, length)
            if real is None:
                state = state + recurrence.times(before[..., None], length)[..., 0]
            else:
                count = real.sum(1)
                state = state + recurrence.after(before, count)
                since = torch.arange(length, device=x.device) - (length - count)[:, None]
                answer = answer.gather(2, since.clamp(min=0)[:, None].expand_as(answer))
            mixed = mixed + answer
        memory.keep(length, state=state)
        return mixed


def _padding_first(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor | None]:
    """x (B, H, T) with padding set to zero and moved before the text of its row; the order of columns (B, H, T), or None where
    nothing moved."""
    x = x * real[:, None].to(x.dtype)
    if bool((real[:, 1:] >= real[:, :-1]).all()):
        return x, None
    order = real.int().argsort(dim=1, stable=True)[:, None].expand_as(x)
    return x.gather(2, order), order


@dataclass(frozen=True)
class StateSpaceMixer(Mixer):
    """Base of both mixers.

    `states`: N, the real size of a channel's state; `systems`: the number of A and B, which channels share evenly;
    `dt_min`, `dt_max`: bounds of the initial steps; `lr`: the learning rate of A, B and Δ (none: the training's);
    `mlp`: whether a feed-forward network follows.
    """

    states: int = 64
    systems: int = 1
    dt_min: float = 1e-3
    dt_max: float = 0.1
    lr: float | None = 1e-3
    mlp: bool = False

    cost = "time n log n, state of one size"
    knows_order = True
    replaces_mlp = True

    def __post_init__(self) -> None:
        self.require(
            self.states >= 2 and self.states % 2 == 0, f"states must be even and at least 2, not {self.states}"
        )
        self.require(self.systems >= 1, f"systems must be at least 1, not {self.systems}")
        self.require(
            0 < self.dt_min <= self.dt_max, f"needs 0 < dt_min <= dt_max, not {self.dt_min:g} and {self.dt_max:g}"
        )
        self.require(self.lr is None or self.lr > 0, f"lr must be above 0, not {self.lr}")
        object.__setattr__(self, "replaces_mlp", not self.mlp)

    def build(self, config: LongspanConfig, layer: int, encoding: PositionEncoding, *, causal: bool) -> nn.Module:
        self.check_direction(causal)
        self.check_position_encoding(config, encoding)
        width = config.hidden_size
        self.require(
            width % self.systems == 0, f"systems={self.systems} does not divide the {width} channels; use a divisor"
        )
        self.check_dropout(config)
        return StateSpaceLayer(self._space(config, 1 if causal else 2), layer, width, causal=causal)

    def _space(self, config: LongspanConfig, directions: int) -> StateSpace:
        raise NotImplementedError


@dataclass(frozen=True)
class S4(StateSpaceMixer):
    """State spaces of HiPPO-LegS, diagonal plus rank one, by the bilinear rule.

    `length`: the L of C~, by default the training length; longer texts need doublings of it.
    """

    length: int | None = None

    name = "s4"
    title = "S4: state spaces with a part of rank one"
    paper = "Gu 2022, arXiv 2111.00396"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.length is None or self.length >= 1, f"length must be at least 1 token, not {self.length}")

    def _space(self, config: LongspanConfig, directions: int) -> StateSpace:
        length = self.length or config.max_position_embeddings
        return LowRankSpace(self, config.hidden_size, directions, length)


@dataclass(frozen=True)
class S4D(StateSpaceMixer):
    """Diagonal state spaces. `init`: the initial poles; `rule`: the discretisation."""

    init: Literal["lin", "inv", "real", "legs"] = "lin"
    rule: Literal["zoh", "bilinear"] = "zoh"

    name = "s4d"
    title = "S4D: diagonal state spaces"
    near = ("dss", "s5", "mamba")
    paper = "Gu 2022, arXiv 2206.11893"

    def _space(self, config: LongspanConfig, directions: int) -> StateSpace:
        return DiagonalSpace(self, config.hidden_size, directions)
