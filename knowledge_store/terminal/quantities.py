"""Numbers as people read them."""

from __future__ import annotations


def byte_size(count: float) -> str:
    """Bytes with a decimal unit: `14.1 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def amount(count: float) -> str:
    """A count with thousands marked, and in words where it is large: `2,400,000 (2.4 M)`."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if count >= size:
            return f"{count:,.0f} ({count / size:.1f} {letter})"
    return f"{count:,.0f}"


def binary_size(count: float) -> str:
    """Bytes in binary units, as limits of memory are given: `2 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} GiB"
