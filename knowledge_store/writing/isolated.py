"""`verify` in a process of its own, for a store that comes from somebody else (see `isolation.child`).

A Parquet file of a few kilobytes may stand for many gigabytes, with every hash as it should be. The child that reads it has a
limit of memory, and of time for each shard: a store may have any number of them.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import IO, Any

from knowledge_store.errors import InputError, LimitError
from knowledge_store.isolation.child import (
    MAX_MEMORY_LIMIT,
    MEMORY_LIMIT,
    Killed,
    Report,
    limit,
    limit_time,
    load_arrow,
    started,
)
from knowledge_store.reporter import SILENT, Advance, Reporter
from knowledge_store.writing.verification import Verification, verify

MIN_MEMORY_LIMIT = 2**26
SHARD_TIME = 600.0  # seconds


def verify_isolated(store: str, reporter: Reporter = SILENT, memory_limit: float = MEMORY_LIMIT) -> Verification:
    """`verify` within limits.

    Args:
        store: its address.
        reporter: as of `verify`.
        memory_limit: in bytes, beside what the libraries take.

    Raises:
        LimitError: a shard needs more memory or time than that; names it. It is the one being read, and may be damaged or not.
        StoreError, NewerVersionError: as of `verify`.
        InputError: the limit is too small.
    """
    if not memory_limit >= MIN_MEMORY_LIMIT:
        raise InputError(f"a memory limit is at least {MIN_MEMORY_LIMIT >> 20} MiB, and this is {memory_limit / 2**20:g} MiB")
    memory_limit = int(min(memory_limit, MAX_MEMORY_LIMIT))
    place = "what it holds"
    with ExitStack() as stack:
        advance: Advance = lambda amount, **figures: None  # noqa: E731

        def hear(report: dict[str, Any]) -> None:
            nonlocal advance, place
            if "title" in report:
                advance = stack.enter_context(reporter.progress(report["title"], report["total"], report["unit"]))
            else:
                place = report["figures"].get("reading", place)
                advance(report["amount"], **report["figures"])

        request = {"store": store, "memory_limit": memory_limit}
        child = stack.enter_context(started("knowledge_store.writing.isolated:answer", request))
        try:
            return Verification(**child.result(hear))
        except (Killed, MemoryError) as error:
            if isinstance(error, Killed) and error.signal == signal.SIGALRM:
                reason = f"took more than {SHARD_TIME:g} s"
            elif isinstance(error, Killed):
                reason = f"ended the process ({error}), which may have needed more than {memory_limit / 2**30:g} GiB of memory"
            else:
                reason = f"takes more than {memory_limit / 2**30:g} GiB of memory"
            raise LimitError(
                f"{store} was not verified within its limits: to read {place} {reason}. A few bytes may stand for very many: if"
                " you trust whoever made this store, give a larger memory limit"
            ) from None


class _Messenger(Reporter):
    """Tells the parent. With each sign of progress, the time begins again."""

    def __init__(self, report: Report):
        self._report = report

    @contextmanager
    def progress(self, title: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        self._report({"title": title, "total": total, "unit": unit})

        def advance(amount: float, **figures: str) -> None:
            limit_time(SHARD_TIME)
            self._report({"amount": amount, "figures": figures})

        yield advance


def answer(request: dict[str, Any], outlet: IO[bytes], report: Report) -> dict[str, Any]:
    """The child's task: verify one store. Returns the fields of a `Verification`."""
    load_arrow()
    limit(request["memory_limit"], SHARD_TIME)
    return asdict(verify(request["store"], _Messenger(report)))
