"""Durations as people write them."""

import re

from opsin.errors import BadInput

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str | float) -> float:
    """Seconds of `"90s"`, `"5m"`, `"1.5h"` or a plain number of seconds. Raises BadInput."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(text))
    seconds = float(match[1]) * UNITS.get(match[2], 1.0) if match else 0.0
    if seconds <= 0:
        raise BadInput(f"'{text}' is not a duration; write for example 90s, 5m or 1h")
    return seconds
