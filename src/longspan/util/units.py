"""Sizes and durations as text."""

from __future__ import annotations

from longspan.util.errors import SpecError


def read_size(text: str, what: str = "length") -> int:
    """A number of tokens from `4096`, `4k` (= 4,096) or `1m` (= 1,048,576).

    Raises `SpecError` for other text.
    """
    units = {"k": 1024, "m": 1024**2}
    number, unit = (text[:-1], units[text[-1].lower()]) if text and text[-1].lower() in units else (text, 1)
    try:
        size = float(number) * unit
    except ValueError:
        size = float("nan")
    if not (size == size and abs(size) < 2**53 and size == int(size)) or "_" in text:
        raise SpecError(f"{what} must be a whole number such as 4096 or 4k, not {text!r}")
    return int(size)


def duration(seconds: float) -> str:
    """A time in seconds as text: `24 ms`, `3.21 s`, `12 min`, `2 h 05 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(number: float) -> str:
    """Bytes as text, in powers of ten: `47.2 MB`, `1.41 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.0f} {name}" if number >= 99.5 * unit else f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"


def tokens(length: int) -> str:
    """A number of tokens as text, with `k` for whole multiples of 1,024: `32k`."""
    if length % 1024**2 == 0:
        return f"{length // 1024**2}m"
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"
