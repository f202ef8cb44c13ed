"""Static RoPE scaling: other frequencies, with which positions past the training length have angles seen in training.

With d rotated channels, base b, training length L, target length L' and s = L'/L, the plain frequencies are
theta_i = b^(-2i/d), i = 0 … d/2 - 1. Each method is a rule from theta_i to new frequencies, with a factor on cos and sin. It is
written to `config.rope_parameters` as one of transformers' own types, so a saved model runs without longspan: rules that
transformers has no type for are written as LongRoPE factors theta_i / new_i.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from longspan.core.facts import ModelFacts, RopeFacts
from longspan.core.method import Method
from longspan.util.errors import NotSupported, SpecError
from longspan.util.textfiles import read_text

Frequencies = np.ndarray


def plain_frequencies(rope: RopeFacts) -> Frequencies:
    """The frequencies theta_i (d/2,), float64, of the unscaled model."""
    return rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)


@dataclass(frozen=True)
class RopeScaling(Method):
    """Base of the static rules. `factor`: s, which otherwise follows from the target length."""

    factor: float | None = None

    slots = frozenset({"frequencies"})
    cost = "time n², cache n"
    exportable = True

    def __post_init__(self) -> None:
        self.require(
            self.factor is None or 1 <= self.factor <= 4096, f"factor must be from 1 to 4096, not {self.factor}"
        )

    def check(self, facts: ModelFacts) -> None:
        if facts.rope is None:
            raise NotSupported(
                f"{self.name} rescales rotary positions, and {facts.architecture} has none that can be rescaled; "
                "use none, or a model with RoPE (Llama, Mistral, Qwen, Phi-3, Gemma, …)"
            )
        if facts.rope.type != "default":
            raise NotSupported(
                f"{self.name}: this checkpoint's positions are scaled already ({facts.rope.type}, window {facts.window:,}), and "
                f"a second scaling is not what the paper does; use none, or {facts.rope.beyond} beyond that window"
            )

    def resolve(self, facts: ModelFacts, length: int | None) -> Self:
        if self.factor is not None:
            return self
        if length is None:
            raise SpecError(f"{self.name} needs factor=… or a target length, for example {self.name}:factor=4")
        return replace(self, factor=self.factor_for(max(1.0, length / facts.window)))

    def factor_for(self, ratio: float) -> float:
        """The factor for a target of `ratio` times the window: the ratio, rounded up to a multiple of 0.25."""
        return math.ceil(ratio * 4) / 4

    def reach(self, facts: ModelFacts) -> int | None:
        return int(facts.window * (self.factor or 1))

    def training_reach(self, facts: ModelFacts) -> int | None:
        """What the factor stretches the window to, even where frequencies do not carry as far without training (NTK)."""
        return int(facts.window * (self.factor or 1))

    def neutral_length(self) -> int:
        return 2**31 if self.factor == 1 else 0

    def frequencies(self, rope: RopeFacts) -> Frequencies:
        """The scaled frequencies (d/2,), float64, by the paper's formula."""
        raise NotImplementedError

    def attention_factor(self, rope: RopeFacts) -> float:
        """The factor on cos and sin; attention scores have its square."""
        return 1.0

    def rope_parameters(self, rope: RopeFacts) -> dict[str, Any]:
        """The rule as entries of transformers' `rope_parameters`."""
        return as_longrope(rope, self.frequencies(rope), self.factor or 1.0, self.attention_factor(rope))

    def attach(self, site: Any) -> None:
        assert self.factor is not None, "resolve() comes before attach()"
        rope, window = site.facts.rope, int(site.facts.window * self.factor)
        parameters = self.rope_parameters(rope)
        if not site.takes_rope(parameters):
            parameters = as_longrope(rope, self.frequencies(rope), self.factor, self.attention_factor(rope))
        site.set_rope(parameters, window)


def as_longrope(rope: RopeFacts, frequencies: Frequencies, factor: float, attention_factor: float) -> dict[str, Any]:
    """Static frequencies (d/2,) as `rope_parameters` of type `longrope`, with the same factors for short and long inputs."""
    factors = (plain_frequencies(rope) / frequencies).tolist()
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": factor,
        "attention_factor": attention_factor,
        "original_max_position_embeddings": rope.window,
    }


@dataclass(frozen=True)
class PositionInterpolation(RopeScaling):
    """Every frequency divided by s, which compresses positions into the trained range; meant for a short fine-tuning."""

    name = "pi"
    title = "Position interpolation"
    also = ("linear-scaling", "linear-interpolation")
    paper = "Chen 2023, arXiv 2306.15595"

    def frequencies(self, rope: RopeFacts) -> Frequencies:
        return plain_frequencies(rope) / (self.factor or 1.0)

    def rope_parameters(self, rope: RopeFacts) -> dict[str, Any]:
        return {"rope_type": "linear", "factor": self.factor}


@dataclass(frozen=True)
class NTKAware(RopeScaling):
    """A larger base, b·s^(d/(d-2)): the fastest pair keeps its frequency, the slowest is divided by s.

    The pairs between are divided by less than s, so s must exceed the ratio of target length and window. Derived from a length
    it is twice that ratio, and 1 within the window.
    """

    name = "ntk"
    title = "NTK-aware scaling"
    also = ("ntk-aware-scaling", "ntk-scaling", "ntk-aware-scaled-rope")
    paper = "bloc97 2023; Peng 2023, arXiv 2309.00071 §3.1"

    def factor_for(self, ratio: float) -> float:
        return 1.0 if ratio <= 1 else 2 * super().factor_for(ratio)

    def reach(self, facts: ModelFacts) -> int | None:
        return int(facts.window * max(1.0, (self.factor or 1) / 2))

    def theta(self, rope: RopeFacts) -> float:
        """The scaled base."""
        return rope.theta * (self.factor or 1.0) ** (rope.dim / (rope.dim - 2))

    def frequencies(self, rope: RopeFacts) -> Frequencies:
        return plain_frequencies(replace(rope, theta=self.theta(rope)))

    def rope_parameters(self, rope: RopeFacts) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self.theta(rope)}


def _blend(rope: RopeFacts, factor: float, keep: Frequencies) -> Frequencies:
    """Frequencies between theta/s (keep = 0) and theta (keep = 1)."""
    theta = plain_frequencies(rope)
    return theta * (keep + (1 - keep) / factor)


def rotations(rope: RopeFacts) -> Frequencies:
    """r_i = L·theta_i / 2π (d/2,): the rotations of each pair over the training length."""
    return rope.window * plain_frequencies(rope) / (2 * math.pi)


def keep_by_rotations(rope: RopeFacts, slow: float, fast: float) -> Frequencies:
    """The paper's ramp (d/2,): 0 up to `slow` rotations, 1 from `fast` on, linear in the rotations between (YaRN, eq. 18)."""
    return np.clip((rotations(rope) - slow) / (fast - slow), 0, 1)


def keep_by_index(rope: RopeFacts, slow: float, fast: float) -> Frequencies:
    """The code's ramp (d/2,): linear in the pair's index, between the rounded indices of `fast` and `slow` rotations."""

    def index(rotations: float) -> float:
        return rope.dim * math.log(rope.window / (2 * math.pi * rotations)) / (2 * math.log(rope.theta))

    low, high = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), rope.dim - 1)
    ramp = (np.arange(rope.dim // 2) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0, 1)


@dataclass(frozen=True)
class NTKByParts(RopeScaling):
    """Pairs with more than `fast` rotations over the training length keep their frequency, those below `slow` are divided by
    s."""

    slow: float = 1.0
    fast: float = 32.0

    name = "ntk-by-parts"
    title = "NTK-by-parts"
    paper = "Peng 2023, arXiv 2309.00071 §3.2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.slow < self.fast, f"needs 0 < slow < fast, not slow={self.slow:g}, fast={self.fast:g}")

    def frequencies(self, rope: RopeFacts) -> Frequencies:
        return _blend(rope, self.factor or 1.0, keep_by_rotations(rope, self.slow, self.fast))


@dataclass(frozen=True)
class YaRN(NTKByParts):
    """NTK-by-parts with a temperature: cos and sin times 0.1·ln s + 1.

    The ramps of the paper and of its code differ by up to 67 % in a frequency: `ramp=code`, which every checkpoint and library
    uses, is linear in the pair's index, `ramp=paper` in its rotations.
    """

    ramp: Literal["code", "paper"] = "code"

    name = "yarn"
    title = "YaRN"
    paper = "Peng 2023, arXiv 2309.00071"

    def attention_factor(self, rope: RopeFacts) -> float:
        return 0.1 * math.log(self.factor or 1.0) + 1.0

    def frequencies(self, rope: RopeFacts) -> Frequencies:
        keep = keep_by_index if self.ramp == "code" else keep_by_rotations
        return _blend(rope, self.factor or 1.0, keep(rope, self.slow, self.fast))

    def rope_parameters(self, rope: RopeFacts) -> dict[str, Any]:
        if self.ramp == "paper":
            return super().rope_parameters(rope)
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "beta_slow": self.slow,
            "beta_fast": self.fast,
            "attention_factor": self.attention_factor(rope),
            "original_max_position_embeddings": rope.window,
        }


@dataclass(frozen=True)
class Llama3(RopeScaling):
    """Llama 3.1's rule: wavelengths below L/high stay, above L/low are divided by s, linear in the rotations between."""

    low: float = 1.0
    high: float = 4.0

    name = "llama3"
    title = "Llama 3.1 scaling"
    also = ("llama-3.1",)
    paper = "Llama 3.1 model release, 2024"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.low < self.high, f"needs 0 < low < high, not low={self.low:g}, high={self.high:g}")

    def frequencies(self, rope: RopeFacts) -> Frequencies:
        return _blend(rope, self.factor or 1.0, keep_by_rotations(rope, self.low, self.high))

    def rope_parameters(self, rope: RopeFacts) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low,
            "high_freq_factor": self.high,
            "original_max_position_embeddings": rope.window,
        }


@dataclass(frozen=True)
class LongRoPE(RopeScaling):
    """Each frequency divided by its own factor, from a search that is not part of this method. `factors`: a JSON file with a
    list of d/2 numbers, or an object with `long_factor`, as in a model's config.json. The paper's unscaled first tokens are
    left out: transformers has no setting for them, and the paper found them useless at 2M tokens."""

    factors: str | None = None

    name = "longrope"
    title = "LongRoPE with given factors"
    near = ("longrope2",)
    paper = "Ding 2024, arXiv 2402.13753"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.factors is not None, "needs factors=FILE.json, a list of one number for each rotated pair")
        self.read_factors()

    def read_factors(self) -> list[float]:
        """The factors (d/2) in the file.

        Raises `SpecError` where it cannot be read or holds other values.
        """
        path = Path(self.factors or "")
        try:
            data = json.loads(read_text(path))
            values = data if isinstance(data, list) else data["long_factor"]
            numbers = [float(v) for v in values]
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"longrope: cannot read factors={self.factors}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(
                f"longrope: {path} must hold a JSON list of numbers, or an object with long_factor"
            ) from error
        self.require(
            bool(numbers) and all(v >= 1 and math.isfinite(v) for v in numbers), f"{path}: every factor must be ≥ 1"
        )
        return numbers

    def check(self, facts: ModelFacts) -> None:
        super().check(facts)
        count = len(self.read_factors())
        if facts.rope and count != facts.rope.dim // 2:
            raise NotSupported(
                f"longrope: {self.factors} has {count} factors, and {facts.architecture} rotates {facts.rope.dim // 2} pairs; "
                "use factors that were searched for this model"
            )

    def frequencies(self, rope: RopeFacts) -> Frequencies:
        return plain_frequencies(rope) / np.array(self.read_factors())

    def attention_factor(self, rope: RopeFacts) -> float:
        s = self.factor or 1.0
        return math.sqrt(1 + math.log(s) / math.log(rope.window)) if s > 1 else 1.0
