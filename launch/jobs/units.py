"""Sizes and durations in human-readable form."""

import re

_UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}
MOST_BYTES = 2**63
MOST_SECONDS = 100 * 365 * 86400
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """80GB -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([MGT]I?B)", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _UNITS[match[2].upper()] if match else 0
    if not 0 < size < MOST_BYTES:
        raise ValueError("write a size such as 80GB or 79GiB")
    return int(size)


def parse_duration(text: str) -> int:
    """90s, 30m, 12h, 2d, 1d12h, or SLURM's 1-12:00:00 and 12:00:00 -> seconds."""
    if match := re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    elif re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text):
        total = sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))
    else:
        total = 0
    if not 0 < total <= MOST_SECONDS:
        raise ValueError("write a time such as 90m, 12h, 1d12h or 1-12:00:00")
    return total


def format_duration(seconds: int) -> str:
    """Seconds -> SLURM's [D-]HH:MM:SS."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours:02}:{minutes:02}:{seconds:02}"
