"""Linear state spaces x' = Ax + Bu, y = Re(Cx), as convolutions and as recurrences (Gu 2022, arXiv 2111.00396).

A is diagonal, or diagonal with a part of rank one taken off, A = Λ - PP*. States come in conjugate pairs, of which one is kept,
so a state of N numbers is N/2 complex modes. A recurrence works on the real and imaginary parts of the modes side by side:
in these coordinates everything is a real matrix, and a cache holds plain real numbers.

The convolution's kernel is made without a tensor of channels × modes × length. Everything is of float32 or float64, as its
parameters are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Start = Literal["legs", "lin", "inv", "real"]
NUMBERS_AT_ONCE = 2**24
"""How many terms of the Cauchy sums are held at once."""
LEAST_BLOCK = 64
"""Tokens that enter a state by one product, at least."""


@dataclass(frozen=True)
class Modes:
    """H channels of M = N/2 modes each.

    step Δ (H,) real; poles Λ (H, M), entry B (H, M), exit C (H, M) and low P (H, M), complex; low is None for
    diagonal systems.
    """

    step: Tensor
    poles: Tensor
    entry: Tensor
    exit: Tensor
    low: Tensor | None = None


# Where the modes start


def hippo(n: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS in float64: A (n, n), B (n,) (Gu 2022, equation 2)."""
    order = np.arange(n)
    weight = np.sqrt(2 * order + 1)
    a = -np.tril(weight[:, None] * weight[None], -1) - np.diag(order + 1.0)
    return a, weight


def normal_plus_low_rank(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """HiPPO-LegS as A = V(Λ - PP*)V* (Gu 2022, theorem 1 and appendix C.1): poles Λ, P, B, each (n/2,), of those of each
    conjugate pair that turn upwards, and their columns of V, (n, n/2). With P_k = sqrt(k + 1/2), A + PPᵀ is -1/2 and a skew
    matrix."""
    a, b = hippo(n)
    p = np.sqrt(np.arange(n) + 0.5)
    skew = a + p[:, None] * p[None] + 0.5 * np.eye(n)
    turning, v = np.linalg.eigh(-1j * skew)  # Hermitian, so V is unitary and the poles are -1/2 + i·turning
    upper = slice(n // 2, None)
    poles, v = -0.5 + 1j * turning[upper], v[:, upper]
    return poles, v.conj().T @ p, v.conj().T @ b, v


def starting_poles(start: Start, n: int) -> np.ndarray:
    """The poles of a diagonal system of n states, (n/2,) (Gu 2022, arXiv 2206.11893, section 4: S4D-LegS, -Lin, -Inv, -Real)."""
    m = np.arange(n // 2)
    match start:
        case "legs":
            return normal_plus_low_rank(n)[0]
        case "lin":
            return -0.5 + 1j * np.pi * m
        case "inv":
            return -0.5 + 1j * n / np.pi * (n / (2 * m + 1) - 1)
        case "real":
            return -(m + 1.0) + 0j


# Kernels


def cauchy_kernel(modes: Modes, length: int) -> Tensor:
    """K_0 … K_{length - 1}, (H, length), of a system with a part of rank one under the bilinear rule, whose `exit` is
    C~ = C(I - Ā^length) (Gu 2022, algorithm 1 and appendix C.3).

    At ω = e^(-2πik/length) the kernel's transform is 2/(1 + ω)·[k(C, B) - k(C, P) k(P, B) / (1 + k(P, P))], with the Cauchy sums
    k(u, v) = Σ uv/(g - λ), g = 2/Δ·(1 - ω)/(1 + ω) = 2i/Δ·tan(πk/length). At ω = -1 that is no number; its limit is Δ/2·C~B.
    """
    assert modes.low is not None
    poles = modes.poles * modes.step[:, None]
    pairs = torch.stack(
        (
            modes.exit * modes.entry,
            modes.exit * modes.low,
            modes.low.conj() * modes.entry,
            modes.low.conj() * modes.low,
        ),
        dim=1,
    )
    # A pole and its conjugate together: v/(g - λ) + v̄/(g - λ̄) = (2 Re(v) g - 2 Re(vλ̄)) / ((g - λ)(g - λ̄)).
    weights = 2 * torch.cat((pairs.real, (pairs * poles.conj()[:, None]).real), dim=1)
    count = (length + 1) // 2
    tangents = (torch.arange(count, device=poles.device, dtype=torch.float64) * (math.pi / length)).tan()
    at_once = max(1, NUMBERS_AT_ONCE // poles.numel())
    parts = [
        checkpoint(_cauchy_part, t, poles, weights, modes.step, use_reentrant=False, preserve_rng_state=False)
        for t in tangents.to(modes.step.dtype).split(at_once)
    ]
    if length % 2 == 0:
        limit = modes.step * (modes.exit * modes.entry).real.sum(-1)
        parts.append(torch.complex(limit, torch.zeros_like(limit))[:, None])
    return torch.fft.irfft(torch.cat(parts, dim=1), n=length)


def _cauchy_part(tangents: Tensor, poles: Tensor, weights: Tensor, step: Tensor) -> Tensor:
    """The transform at some frequencies, (H, F), from weights (H, 8, M): four sums, for each its part with g and without."""
    decay, turn = poles.real[..., None], poles.imag[..., None]
    g = 2 * tangents  # times i/Δ
    real, imaginary = decay.square() + (turn - g) * (turn + g), -2 * decay * g
    size = real.square() + imaginary.square()
    sums = weights @ torch.cat((real / size, -imaginary / size), dim=-1)
    sums = torch.complex(*sums.chunk(2, dim=-1)) * step[:, None, None]
    turned, still = sums.chunk(2, dim=1)
    cb, cp, pb, pp = (1j * g * turned - still).unbind(1)
    return (1 + 1j * tangents) * (cb - cp * pb / (1 + pp))


def vandermonde_kernel(recurrence: DiagonalRecurrence, length: int) -> Tensor:
    """K_l = 2 Re Σ C B̄ Ā^l for l < length, (H, length) (Gu 2022, arXiv 2206.11893, section 3). Powers of Ā are needed up to
    the root of the length, and at its multiples."""
    width = math.isqrt(length - 1) + 1
    height = -(-length // width)
    near = recurrence.powers(torch.arange(width, device=recurrence.rate.device))
    far = recurrence.powers(width * torch.arange(height, device=recurrence.rate.device))
    weights = (recurrence.exit * recurrence.entry)[..., None] * far
    return 2 * (weights.mT @ near).real.flatten(1)[:, :length]


def convolve(x: Tensor, kernel: Tensor, reverse: Tensor | None = None) -> Tensor:
    """Σ_s K_{t-s} x_s over s <= t, and over s > t with reverse_{s-t-1}, (B, H, T) for x (B, H, T) and kernels (H, T), by
    Fourier transforms of 2T points, so that nothing wraps around."""
    length = x.shape[-1]
    kernel = F.pad(kernel, (0, length))
    if reverse is not None:
        kernel = kernel + F.pad(reverse.flip(-1), (length, 0))
    spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


# Recurrences


def pack(modes: Tensor) -> Tensor:
    """(…, M) complex as (…, 2M) real: real parts, then imaginary ones."""
    return torch.cat((modes.real, modes.imag), dim=-1)


def unpack(state: Tensor) -> Tensor:
    """What `pack` was given."""
    real, imaginary = state.chunk(2, dim=-1)
    return torch.complex(real, imaginary)


def reader(exit: Tensor) -> Tensor:
    """The row (…, N) by which y = 2 Re(Cx) is read off a packed state."""
    return 2 * pack(exit.conj())


class Recurrence(ABC):
    """x_t = Āx_{t-1} + B̄u_t, y_t = Cx_t of H channels, on packed states of N numbers."""

    @abstractmethod
    def step(self, state: Tensor, x: Tensor) -> Tensor:
        """One token: state (B, H, N), x (B, H)."""

    @abstractmethod
    def times(self, state: Tensor, count: int) -> Tensor:
        """Ā^count applied to (B, H, N, K)."""

    @abstractmethod
    def entering(self, count: int) -> Tensor:
        """Ā^s B̄ for s < count, (H, N, count)."""

    @abstractmethod
    def leaving(self, count: int) -> Tensor:
        """CĀ^(s + 1) for s < count, (H, count, N)."""

    @abstractmethod
    def read(self, state: Tensor) -> Tensor:
        """y (B, H) of a state (B, H, N)."""

    def advance(self, x: Tensor) -> Tensor:
        """The state (B, H, N) that x (B, H, T) leaves behind a state of zeros: blocks of tokens by one product each, then
        neighbours by pairs."""
        length = x.shape[-1]
        size = max(LEAST_BLOCK, 2 ** (length.bit_length() // 2))
        blocks = -(-length // size)
        x = F.pad(x, (blocks * size - length, 0)).unflatten(-1, (blocks, size))
        states = torch.einsum("hns,bhjs->bhnj", self.entering(size).flip(-1), x)
        while states.shape[-1] > 1:
            states = F.pad(states, (states.shape[-1] % 2, 0))
            states = self.times(states[..., 0::2], size) + states[..., 1::2]
            size *= 2
        return states[..., 0]

    def respond(self, state: Tensor, length: int) -> Tensor:
        """What a state (B, H, N) adds to the next `length` outputs, (B, H, length)."""
        size = min(length, max(LEAST_BLOCK, 2 ** (length.bit_length() // 2)))
        states = state[..., None]
        while states.shape[-1] * size < length:
            states = torch.cat((states, self.times(states, size * states.shape[-1])), dim=-1)
        return torch.einsum("hsn,bhnj->bhjs", self.leaving(size), states).flatten(-2)[..., :length]

    def after(self, state: Tensor, counts: Tensor) -> Tensor:
        """Ā^counts applied to states (B, H, N), for each row's own count (B,)."""
        for bit in range(int(counts.max()).bit_length()):
            moved = self.times(state[..., None], 2**bit)[..., 0]
            state = torch.where((counts >> bit & 1).bool()[:, None, None], moved, state)
        return state


class DiagonalRecurrence(Recurrence):
    """Of diagonal modes by the rule `zoh`, Ā = e^(ΔA), B̄ = (Ā - 1)/A·B, or `bilinear`, Ā = (1 + ΔA/2)/(1 - ΔA/2),
    B̄ = ΔB/(1 - ΔA/2) (Gu 2022, arXiv 2206.11893, section 3)."""

    def __init__(self, modes: Modes, rule: Literal["zoh", "bilinear"]):
        scaled = modes.poles * modes.step[:, None]
        if rule == "zoh":
            self.rate = scaled
            self.entry = modes.entry * torch.expm1(scaled) / modes.poles
        else:
            self.rate = torch.log((1 + scaled / 2) / (1 - scaled / 2))
            self.entry = modes.entry * modes.step[:, None] / (1 - scaled / 2)
        self.exit = modes.exit

    def powers(self, counts: Tensor) -> Tensor:
        """Ā^counts, (H, M, *counts)."""
        return torch.exp(self.rate[..., None] * counts)

    def step(self, state: Tensor, x: Tensor) -> Tensor:
        return pack(self.rate.exp() * unpack(state) + self.entry * x[..., None])

    def times(self, state: Tensor, count: int) -> Tensor:
        modes = unpack(state.movedim(-2, -1)) * torch.exp(self.rate * count)[:, None]
        return pack(modes).movedim(-1, -2)

    def entering(self, count: int) -> Tensor:
        powers = self.powers(torch.arange(count, device=self.rate.device))
        return pack((self.entry[..., None] * powers).mT).mT

    def leaving(self, count: int) -> Tensor:
        powers = self.powers(torch.arange(1, count + 1, device=self.rate.device))
        return reader((self.exit[..., None] * powers).mT)

    def read(self, state: Tensor) -> Tensor:
        return (state * reader(self.exit)).sum(-1)


class LowRankRecurrence(Recurrence):
    """Of modes with a part of rank one, by the bilinear rule.

    One token costs O(N) a channel (Gu 2022, appendix C.2); many go through the matrix Ā and its squares, (H, N, N).
    `exit` is C itself.
    """

    def __init__(self, modes: Modes):
        assert modes.low is not None
        self.modes, self.low = modes, modes.low
        self.forward = 2 / modes.step[:, None] + modes.poles
        self.solved = 1 / (2 / modes.step[:, None] - modes.poles)
        self.bend = 1 + 2 * (self.low.abs().square() * self.solved).real.sum(-1, keepdim=True)
        self._squares: list[Tensor] = []

    def step(self, state: Tensor, x: Tensor) -> Tensor:
        """(I - Δ/2 A)⁻¹ [(I + Δ/2 A) x_{t-1} + ΔBu], both sides times 2/Δ, the inverse by Woodbury's formula."""
        modes = unpack(state)
        right = self.forward * modes - self.low * self._low(modes) + 2 * self.modes.entry * x[..., None]
        right = self.solved * right
        return pack(right - self.solved * self.low * (self._low(right) / self.bend))

    def _low(self, modes: Tensor) -> Tensor:
        return 2 * (self.low.conj() * modes).real.sum(-1, keepdim=True)

    def square(self, bit: int) -> Tensor:
        """Ā^(2^bit), (H, N, N)."""
        if not self._squares:
            channels, count = self.low.shape
            start = torch.eye(2 * count, dtype=self.modes.step.dtype, device=self.low.device)[:, None]
            silent = start.new_zeros(2 * count, channels)
            self._squares.append(self.step(start.expand(-1, channels, -1), silent).permute(1, 2, 0))
        while len(self._squares) <= bit:
            self._squares.append(self._squares[-1] @ self._squares[-1])
        return self._squares[bit]

    def times(self, state: Tensor, count: int) -> Tensor:
        for bit in range(count.bit_length()):
            if count >> bit & 1:
                state = self.square(bit) @ state
        return state

    def _rows_times(self, rows: Tensor, count: int) -> Tensor:
        """(H, K, N) times Ā^count from the right."""
        for bit in range(count.bit_length()):
            if count >> bit & 1:
                rows = rows @ self.square(bit)
        return rows

    def entering(self, count: int) -> Tensor:
        first = self.step(pack(torch.zeros_like(self.low))[None], torch.ones_like(self.modes.step)[None])
        columns = first.movedim(0, -1)
        while columns.shape[-1] < count:
            columns = torch.cat((columns, self.times(columns, columns.shape[-1])), dim=-1)
        return columns[..., :count]

    def leaving(self, count: int) -> Tensor:
        rows = self._rows_times(reader(self.modes.exit)[:, None], 1)
        while rows.shape[1] < count:
            rows = torch.cat((rows, self._rows_times(rows, rows.shape[1])), dim=1)
        return rows[:, :count]

    def read(self, state: Tensor) -> Tensor:
        return (state * reader(self.modes.exit)).sum(-1)

    def truncated(self, exit: Tensor, length: int) -> Tensor:
        """C~ = C(I - Ā^length) from C, both (H, M)."""
        row = reader(exit)[:, None]
        return _exit_of((row - self._rows_times(row, length))[:, 0])

    def doubled(self, exit: Tensor, length: int) -> Tensor:
        """C~ for twice the length: C(I - Ā^2L) = C~(I + Ā^L)."""
        row = reader(exit)[:, None]
        return _exit_of((row + self._rows_times(row, length))[:, 0])

    def restored(self, exit: Tensor, length: int) -> Tensor:
        """C from C~ = C(I - Ā^length)."""
        eye = torch.eye(2 * exit.shape[-1], dtype=self.modes.step.dtype, device=exit.device)
        kept = eye - self.times(eye.expand(len(exit), -1, -1), length)
        return _exit_of(torch.linalg.solve(kept.mT, reader(exit)))


def _exit_of(row: Tensor) -> Tensor:
    """C from the row that `reader` makes of it."""
    return unpack(row / 2).conj().resolve_conj()
