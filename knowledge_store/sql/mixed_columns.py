"""Columns of the corpus that dumps of a store have in several types, in the one relation `sequences`.

DuckDB would make one type of them: numbers would be compared and sorted as text where another dump has texts, and large
integers rounded where it has fractions.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from knowledge_store.format.manifest import Manifest
from knowledge_store.format.sequences import sequences_schema
from knowledge_store.sql.quoting import identifier, literal

# Those that a column can have in several dumps (`CORPUS_TYPES`, and the score of an answer), as DuckDB calls them.
_NAMES = {pa.int64(): "BIGINT", pa.float64(): "DOUBLE", pa.bool_(): "BOOLEAN", pa.string(): "VARCHAR"}
_NUMBERS = {"BIGINT", "DOUBLE"}
_LARGEST = 2**53  # up to there a double holds every integer


def mixed_columns(manifests: Iterable[Manifest]) -> dict[str, tuple[str, ...]]:
    """The columns, in small letters, that dumps have in several types: which types, as DuckDB calls them."""
    types: dict[str, set[str]] = {}
    for manifest in manifests:
        for column in sequences_schema(manifest):
            if column.type in _NAMES and column.name:  # SQL can name no other
                types.setdefault(column.name.lower(), set()).add(_NAMES[column.type])
    return {column: tuple(sorted(found)) for column, found in types.items() if len(found) > 1}


def fields_of(mixed: dict[str, tuple[str, ...]]) -> str:
    """How SQL asks for the values of columns that are STRUCTs: `id.BIGINT or id.VARCHAR`."""
    names = (f"{identifier(column)}.{each}" for column, types in mixed.items() if _is_struct(types) for each in types)
    return " or ".join(names)


def field_of(column: str, manifest: Manifest, mixed: dict[str, tuple[str, ...]]) -> str:
    """How SQL asks for a column of one of the dumps where it is a STRUCT; empty where it is none."""
    types, own = mixed.get(column.lower(), ()), _NAMES.get(sequences_schema(manifest).field(column).type)
    return f"{identifier(column)}.{own}" if own in types and _is_struct(types) else ""


def _is_struct(types: tuple[str, ...]) -> bool:
    """Whether a column of such types is a STRUCT of them: all but one of numbers alone."""
    return set(types) != _NUMBERS


def replacements(manifest: Manifest, mixed: dict[str, tuple[str, ...]]) -> str:
    """What a dump's rows have in place of its own columns, as DuckDB's `* REPLACE (…)` takes it; empty where that is nothing.

    Integers are doubles where other dumps have these, and those that no double holds are an error, for whoever asks for them.
    Of other types each value keeps its own, as a field of a STRUCT that is called after the type.
    """
    replaced = []
    for column in sequences_schema(manifest):
        types, name = mixed.get(column.name.lower(), ()), identifier(column.name)
        own = _NAMES.get(column.type)
        if own not in types:
            continue
        if _is_struct(types):
            fields = ", ".join(f'"{each}" {each}' for each in types)
            values = ", ".join(f"'{each}': {name if each == own else 'NULL'}" for each in types)
            replaced.append(f"CASE WHEN {name} IS NOT NULL THEN CAST({{{values}}} AS STRUCT({fields})) END AS {name}")
        elif own == "BIGINT":
            problem = literal(
                f"the column {column.name} of the dump {manifest.dump} has integers that no DOUBLE holds, which it is in"
                f" another dump: leave it out (`SELECT * EXCLUDE ({name})`), or ask a store that has this dump alone"
            )
            fits = f"{name} BETWEEN {-_LARGEST} AND {_LARGEST}"
            replaced.append(
                f"CASE WHEN {fits} THEN CAST({name} AS DOUBLE) WHEN {name} IS NOT NULL THEN error({problem}) END AS {name}"
            )
    return ", ".join(replaced)
