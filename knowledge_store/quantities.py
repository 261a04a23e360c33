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


def counted(count: int, one: str, many: str) -> str:
    """A count with what is counted, in the singular or the plural: `1 row`, `2,000 rows`."""
    return f"{count:,} {one if count == 1 else many}"


def percentage(share: float) -> str:
    """A share in percent, to two digits, and never as 0% where there is some: `12%`, `0.034%`."""
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.3g}%"


def binary_size(count: float) -> str:
    """Bytes in binary units, as limits of memory are given: `2 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:,.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} GiB"


def duration(seconds: float) -> str:
    """Seconds as a person reads them: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
