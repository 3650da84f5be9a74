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
    return f"{_scale(count, 1024, 'KMGTP')}iB"


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
    return f"{_scale(count, 1000, 'kMGTPE')}FLOP"


def _scale(count: float, base: int, prefixes: str) -> str:
    """Divide by `base` until the count is below it, or the prefixes end; return the count and its prefix."""
    for prefix in prefixes:
        count /= base
        if count < base or prefix == prefixes[-1]:
            break
    return f"{count:,.1f} {prefix}"
