"""Large numbers with unit prefixes, for people to read."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Format a number of bytes with a binary prefix.

    Example:
        >>> format_bytes(12_582_912)
        '12.0 MiB'
        >>> format_bytes(1000)
        '1000 bytes'
    """
    if count < 1024:
        return f"{count:.0f} bytes"
    for prefix in "KMGTP":
        count /= 1024
        if count < 1024 or prefix == "P":
            break
    return f"{count:,.1f} {prefix}iB"


def format_flops(count: float) -> str:
    """Format a number of floating-point operations with a decimal prefix.

    Example:
        >>> format_flops(90_230_000_000)
        '90.2 GFLOP'
        >>> format_flops(12)
        '12 FLOP'
    """
    if count < 1000:
        return f"{count:.0f} FLOP"
    for prefix in "kMGTPE":
        count /= 1000
        if count < 1000 or prefix == "E":
            break
    return f"{count:,.1f} {prefix}FLOP"
