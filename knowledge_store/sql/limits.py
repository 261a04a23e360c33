"""The limits of a query: its memory in bytes, and its time in seconds."""

from __future__ import annotations

from knowledge_store.errors import InputError, QueryError
from knowledge_store.terminal.quantities import binary_size

MEMORY_LIMIT = 2 * 2**30
TIMEOUT = 60.0
MIN_MEMORY_LIMIT = 32 * 2**20
MAX_MEMORY_LIMIT = 2**50  # limits take no more


def check_limits(memory_limit: float, timeout: float) -> None:
    """Make sure that limits are such.

    Raises:
        InputError: one is too small, or no number.
    """
    if not memory_limit >= MIN_MEMORY_LIMIT:
        raise InputError(f"a memory limit is at least {binary_size(MIN_MEMORY_LIMIT)}, and this is {binary_size(memory_limit)}")
    if not timeout > 0:
        raise InputError(f"a time limit is more than 0 seconds, and this is {timeout:g}")


def interrupted(timeout: float) -> QueryError:
    """What to say of a query that had its time."""
    return QueryError(f"this SQL was interrupted: it had not been answered after {timeout:g} s, its limit of time")
