"""The limits of a query: its memory in bytes, and its time in seconds."""

from __future__ import annotations

from knowledge_store.errors import InputError, QueryLimitError, StoreError
from knowledge_store.quantities import binary_size

MEMORY_LIMIT = 2 * 2**30
TIMEOUT = 60.0
MIN_MEMORY_LIMIT = 32 * 2**20


def check_limits(memory_limit: float, timeout: float) -> None:
    """Make sure that limits are such.

    Raises:
        InputError: one is too small, or no number.
    """
    if not memory_limit >= MIN_MEMORY_LIMIT:
        raise InputError(f"a memory limit is at least {binary_size(MIN_MEMORY_LIMIT)}, and this is {binary_size(memory_limit)}")
    if not timeout > 0:
        raise InputError(f"a time limit is more than 0 seconds, and this is {timeout:g}")


def interrupted(timeout: float) -> QueryLimitError:
    """What to say of a query that had its time."""
    return QueryLimitError(f"this SQL was interrupted: it had not been answered after {timeout:g} s, its limit of time")


def not_opened(timeout: float, memory_limit: float, reason: str) -> StoreError:
    """What to say of a store that a process with limits could not open."""
    return StoreError(f"the store could not be opened within {timeout:g} s and {binary_size(memory_limit)} ({reason})")


def broken(reason: str, memory_limit: float) -> QueryLimitError:
    """What to say of a query that ended its process."""
    return QueryLimitError(
        f"this SQL broke the process that ran it ({reason}): it may need more memory than its {binary_size(memory_limit)}"
    )
