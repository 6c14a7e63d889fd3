"""Parse and format sizes, such as 80GiB or 141GB."""

from __future__ import annotations

import re

from titan_config import ConfigError

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


def parse_bytes(text: str) -> int:
    """Return the number of bytes of a size such as "80GiB", "141 GB" or "512MiB". Raises ConfigError for other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*", text)
    factor = {unit.lower(): factor for unit, factor in UNITS.items()}.get(match[2].lower()) if match else None
    if match is None or factor is None or not float(match[1]) * factor >= 1:
        raise ConfigError(
            f"Device memory must be a number above 0 and a unit ({', '.join(UNITS)}), got {text!r}. Write 80GiB or "
            "141GB, for example."
        )
    return round(float(match[1]) * factor)


def show_bytes(number: float) -> str:
    """Return a size in bytes with three or four digits: "1.50 GiB", "12 B"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(number) >= UNITS[unit]:
            value = number / UNITS[unit]
            return f"{value:.2f} {unit}" if abs(value) < 100 else f"{value:.0f} {unit}"
    return f"{number:.0f} B"


def show_count(number: float) -> str:
    """Return a count with three digits and an SI prefix: "8.03 G", "405 G", "12"."""
    for power, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g}"
