"""Hostile SQL for as long as one likes: the corpus, then what a seed makes of it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
from hostile_sql import BOMBS, HARMLESS, REFUSED, WORDS, filled_in, lay_bait, standing
from stores import write_store

from knowledge_store import KnowledgeStore, KnowledgeStoreError
from torture.heartbeat import beat

MEMORY_LIMIT = 256 * 2**20
TIMEOUT = 1.0
BY_A_LIMIT = ("was interrupted", "more memory than")
GRACE = 60.0  # seconds of processor time that a query may take beside its limit, to open the store, to start and to end
OWN_MEMORY = 256 * 2**20  # of the process that answers, before it saw the query


def _peak(who: int) -> int:
    """Most bytes in memory at once."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _children_peak() -> int:
    return _peak(resource.RUSAGE_CHILDREN)


def _processor_time() -> float:
    """Seconds of processor time of this process and of the queries' processes. However busy a machine is, it adds none."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _quoted(sql: str) -> str:
    return "'" + sql.replace("'", "''") + "'"


WRAPPERS = [
    lambda sql, _: f"SELECT * FROM ({sql})",
    lambda sql, _: f"WITH x AS ({sql}) SELECT * FROM x",
    lambda sql, _: f"WITH x AS MATERIALIZED ({sql}) SELECT count(*) FROM x",
    lambda sql, _: f"({sql})",
    lambda sql, _: f"SELECT dump FROM dumps UNION ALL BY NAME ({sql})",
    lambda sql, _: f"SELECT ({sql})",
    lambda sql, _: f"SELECT * FROM dumps WHERE EXISTS ({sql})",
    lambda sql, _: f"SELECT * FROM dumps, LATERAL ({sql})",
    lambda sql, _: f"PIVOT ({sql}) ON 1",
    lambda sql, _: f"DESCRIBE {sql}",
    lambda sql, _: f"SUMMARIZE {sql}",
    lambda sql, _: f"EXPLAIN {sql}",
    lambda sql, _: f"EXPLAIN ANALYZE {sql}",
    lambda sql, _: f"PREPARE p AS {sql}",
    lambda sql, _: f"CREATE MACRO f() AS TABLE {sql}",
    lambda sql, _: f"FROM query({_quoted(sql)})",
    lambda sql, _: f"FROM json_execute_serialized_sql(json_serialize_sql({_quoted(sql)}))",
    lambda sql, _: f"SELECT 1; {sql}",
    lambda sql, _: f"{sql}; SELECT 1",
    lambda sql, _: f"COPY ({sql}) TO '{{outside}}/out.csv'",
    lambda sql, _: f"/* {sql} */ {sql} -- {sql}",
    lambda sql, _: sql.upper().replace("{SECRET}", "{secret}").replace("{OUTSIDE}", "{outside}").replace("{STORE}", "{store}"),
    lambda sql, _: sql.replace(" ", "/**/"),
    lambda sql, _: sql.replace(" ", "\n\t\v\f"),
    lambda sql, _: sql.replace(" ", "\u00a0"),
    lambda sql, _: sql.replace("{secret}", "{store}/../secret"),
    lambda sql, _: sql.replace("{secret}", "{store}/up/./secret"),
    lambda sql, _: sql.replace("{secret}", "file:{outside}//secret"),
    lambda sql, _: sql.replace("{secret}", "secret"),
    lambda sql, _: sql.replace("{secret}", "./store/small/.././up/secret"),
    lambda sql, _: sql.replace("{secret}.txt", ":memory:"),
    lambda sql, chance: sql.replace("{secret}", "{secret}*" if chance.random() < 0.5 else "{outside}/**/secret"),
]


def mutated(sql: str, chance: random.Random) -> str:
    """Another attempt, made of one: wrapped, spelt otherwise, or with something left out, doubled or exchanged."""
    for _ in range(chance.randrange(1, 4)):
        what = chance.random()
        if what < 0.7:
            sql = chance.choice(WRAPPERS)(sql, chance)
        else:
            words = sql.split(" ")
            place = chance.randrange(len(words))
            if what < 0.8:
                del words[place]
            elif what < 0.9:
                words.insert(place, chance.choice(words))
            else:
                words[place] = chance.choice(chance.choice(list(REFUSED.values())).split(" "))
            sql = " ".join(words)
    return sql


class Stand:
    """A small store among files that are none of a query's business, to try attempts on."""

    def __init__(self, folder: Path):
        self.outside = folder
        write_store(folder / "store")
        lay_bait(folder)
        self._store = KnowledgeStore.open(folder / "store")
        self._store.sql("SELECT 1")
        self._before = standing(folder)
        self._others = _children_peak()  # of processes that other tests had before
        self.counts: Counter[str] = Counter()

    def attempt(self, sql: str, *, isolated: bool = False, timeout: float = TIMEOUT) -> str:
        """Try one. Returns how it ended: refused, interrupted or answered.

        Raises:
            AssertionError: it saw, changed or outlived what it must not.
        """
        text = filled_in(sql, self.outside)
        beat(f"attempt {self.counts['attempts'] + 1}: {text[:300]}")
        python_variable = pa.table({"who": [WORDS]})
        before = _processor_time()
        try:
            answer = self._store.sql(text, memory_limit=MEMORY_LIMIT, timeout=timeout, isolated=isolated)
            ended = "answered"
            shown = str(answer.to_pydict()) if answer.nbytes < 2**20 else ""
            assert WORDS not in shown, f"{text!r} saw outside"
            assert answer.nbytes <= MEMORY_LIMIT, f"{text!r} was answered with {answer.nbytes:,} bytes"
        except KnowledgeStoreError as error:
            assert "\n" not in str(error), f"{text!r} took several lines to refuse"
            ended = "interrupted" if any(words in str(error) for words in BY_A_LIMIT) else "refused"
            assert WORDS not in str(error), f"{text!r} saw outside: {error}"
        except (OverflowError, ValueError):  # Python has no such value: nothing was seen
            ended = "answered"
        del python_variable
        took = _processor_time() - before
        most = timeout * (os.cpu_count() or 1) + GRACE
        assert took < most, f"{text!r} took {took:.0f} s of processor time, and its limit was {timeout:g} s"
        self.counts["attempts"] += 1
        self.counts[ended] += 1
        return ended

    def check(self, what: str) -> None:
        """Make sure that nothing has changed, and that no process took more memory than it may."""
        now = standing(self.outside)
        assert now == self._before, f"{what} changed {sorted(set(now.items()) ^ set(self._before.items()))}"
        # Linux counts what a process had before it became another: our own peak.
        own, peak = _peak(resource.RUSAGE_SELF), _children_peak()
        assert peak <= max(own, self._others, OWN_MEMORY + MEMORY_LIMIT), f"{what} took {peak / 2**20:.0f} MiB"


def run(seed: int, minutes: float, folder: Path, combinations: int | None = None) -> dict[str, int]:
    """All of the corpus, then combinations of it until the time is over.

    Bombs go off in a process of their own, as does each tenth of the others.

    Args:
        seed: of the combinations.
        minutes: how long to try combinations.
        folder: an empty folder.
        combinations: try so many, however long it takes.

    Returns:
        attempts, and how many of them were refused, interrupted (by a limit) or answered; faults, survived, silent.
    """
    with contextlib.chdir(folder):
        return _run(seed, time.monotonic() + 60 * minutes, Stand(Path.cwd()), combinations)


def _run(seed: int, end: float, stand: Stand, combinations: int | None) -> dict[str, int]:
    for name, sql in REFUSED.items():
        assert stand.attempt(sql) != "answered", f"{name} was answered"
        stand.check(name)
    for name, sql in {**HARMLESS, **BOMBS}.items():
        stand.attempt(sql, isolated=name in BOMBS)
        stand.check(name)
    chance = random.Random(seed)
    others = list({**REFUSED, **HARMLESS}.values())
    number = 0
    while number < combinations if combinations is not None else time.monotonic() < end:
        number += 1
        bomb = number % 40 == 0
        sql = mutated(chance.choice(list(BOMBS.values()) if bomb else others), chance)
        where = f"seed {seed}, attempt {number}"
        try:
            filled_in(sql, stand.outside)
        except (KeyError, ValueError, IndexError):  # a mutation that took a brace away
            sql = sql.replace("{", "").replace("}", "")
        try:
            stand.attempt(sql, isolated=bomb or number % 10 == 0)
            stand.check(sql)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
    attempts = stand.counts["attempts"]
    return {"faults": attempts, "survived": attempts, "silent": 0, **stand.counts}
