"""`KnowledgeStore`: a folder of dumps, opened to be queried, read and checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.catalogue.dumps import Dumps, open_dumps
from knowledge_store.catalogue.summary import DumpSummary, summarise, what_is_missing
from knowledge_store.choice.answers import MEMORY_LIMIT as CHOICE_MEMORY_LIMIT
from knowledge_store.choice.answers import TIMEOUT as CHOICE_TIMEOUT
from knowledge_store.choice.sequences import ChosenSequences, check_query, choose_sequences
from knowledge_store.choice.targets import ChosenTargets, check_condition, choose_targets
from knowledge_store.errors import InputError
from knowledge_store.format.layout import COMMITS, SEQUENCES, TOKENS_FILE
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.parquet import read_table
from knowledge_store.format.sequences import sequences_schema
from knowledge_store.kinds import KINDS, Arrays, item_mask
from knowledge_store.kinds.kind import check_held
from knowledge_store.kinds.positions import POSITIONS, positions_of
from knowledge_store.reading.batches import Batches
from knowledge_store.reading.cache import CACHE_SIZE
from knowledge_store.reading.distillkit import export_distillkit
from knowledge_store.reading.dpo import ExportedPairs, export_dpo
from knowledge_store.reading.groups import Groups, check_groups
from knowledge_store.reading.mixture import Named
from knowledge_store.reading.ordinals import AllBut
from knowledge_store.reading.plan import ReadPlan
from knowledge_store.reading.readers import Readers
from knowledge_store.reading.speculators import export_speculators
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.sql.answers import visible
from knowledge_store.sql.create_statements import create_statements
from knowledge_store.sql.export import export
from knowledge_store.sql.isolated import check_answered, isolated_answer
from knowledge_store.sql.limits import MEMORY_LIMIT, TIMEOUT
from knowledge_store.sql.named_files import NamedFiles
from knowledge_store.sql.parameters import Parameters
from knowledge_store.sql.query import run_query
from knowledge_store.sql.statement import Statement
from knowledge_store.storage import Storage, open_storage
from knowledge_store.storage.served.client import ServedStorage
from knowledge_store.writing.rename import rename_dump


class KnowledgeStore:
    """A store as it stood when it was opened: shards committed later are seen by opening it again.

    Make one with `KnowledgeStore.open`. A copy, and one that was pickled, sees the same shards through files of its
    own, as another process needs. Reading never writes to the store.
    """

    def __init__(self, dumps: Dumps, cache_size: int = CACHE_SIZE):
        self.storage = dumps.storage
        self.cache_size = cache_size
        self._dumps = dumps
        self._readers = Readers(dumps, cache_size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": Readers(self._dumps, self.cache_size)}

    @classmethod
    def open(
        cls,
        store: str | Path | Storage,
        *,
        rebuild_index: bool = False,
        cache_size: int = CACHE_SIZE,
        token_file: str | Path | None = None,
        reporter: Reporter = SILENT,
    ) -> KnowledgeStore:
        """Open a store.

        Args:
            store: its folder, its address or its storage.
            rebuild_index: read every commit record, whatever the index says.
            cache_size: the most bytes that decoded sequences, of all stores together, may take in the user's cache folder;
                0 for none.
            token_file: of a store that is served (`grpc+tls://host:port`), a file of the token; None takes the token from the
                environment variable KNOWLEDGE_STORE_TOKEN.
            reporter: hears when its server is waited for. It is pickled with the store, for the workers of a loader.

        Raises:
            InputError: an address or a token cannot be used.
            StoreError: there is no store, or one of another format version, or the server does not answer.
            DamageError: its store.json is altered.

        A dump that cannot be used (its manifest or a commit record is altered or cannot be read, it has another name than its
        folder, or a kind of knowledge that is not known) is closed, and the others are open; see `closed`.
        """
        storage = open_storage(store, token_file, reporter)
        return cls(open_dumps(storage, rebuild_index=rebuild_index), cache_size)

    def __enter__(self) -> KnowledgeStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._readers.clear()
        self.storage.close()

    def __repr__(self) -> str:
        dumps = [f"{facts.dump}: {facts.sequences:,} sequences, {facts.positions:,} positions" for facts in self.info()]
        dumps += [f"{name}: closed" for name in self.closed]
        return f"KnowledgeStore({self.address!r}: {'; '.join(dumps) or 'no dumps'})"

    @property
    def closed(self) -> dict[str, str]:
        """The folders whose dump cannot be used, and why, in a sentence. The others are open all the same."""
        return {name: str(error) for name, error in self._dumps.closed.items()}

    @property
    def address(self) -> str:
        """Where the store is, as people name it."""
        return self.storage.address

    @property
    def dumps(self) -> tuple[str, ...]:
        """The names of the dumps, sorted."""
        return tuple(self._dumps.manifests)

    def dump(self, name: str | None = None) -> str:
        """The dump that `name` means; None means the only one, where no folder is closed.

        Raises:
            InputError: there is no such dump, or there are several, closed ones counted, and none was named.
            DamageError, StoreError: it is closed (see `closed`).
        """
        return self._dumps.name(name)

    def manifest(self, dump: str | None = None) -> Manifest:
        """What a dump is."""
        return self._dumps.manifest(dump)

    def tokens(self, dump: str | None = None) -> pa.Table:
        """A dump's vocabulary: token_id uint32, text string (as a person reads it), token string (the tokenizer's name)."""
        return self._dumps.tokens(self.manifest(dump))

    def sequences(self, dump: str | None = None, columns: list[str] | None = None) -> pa.Table:
        """A dump's `sequences` table, or some of its columns, in the order of ordinals."""
        manifest = self.manifest(dump)
        schema = sequences_schema(manifest)
        files = self._dumps.files(manifest, SEQUENCES, schema)
        empty = schema.empty_table().select(columns or schema.names)
        return pa.concat_tables([empty, *(read_table(file, columns) for file in files.values())])

    def what_is_missing(self, dump: str | None = None) -> str | None:
        """A sentence about a dump whose shards are not all there; None of one that is complete."""
        return what_is_missing(self._dumps, self.manifest(dump))

    def info(self) -> list[DumpSummary]:
        """The facts of each dump, from manifests and the index alone."""
        return [summarise(self._dumps, manifest) for manifest in self._dumps.manifests.values()]

    def sql(
        self,
        query: str,
        parameters: Parameters | None = None,
        *,
        memory_limit: int = MEMORY_LIMIT,
        timeout: float = TIMEOUT,
        isolated: bool = False,
        files: NamedFiles | None = None,
    ) -> pa.Table:
        """Answer one SELECT statement over `positions`, `candidates`, `sequences`, `tokens`, `shards` and `dumps`.

        It can write nothing and read nothing but the store and `files`, whoever wrote it. Ctrl-C ends it. Where a folder of
        the store is closed (see `closed`), though undamaged, the others are asked, and a UserWarning names it and says why.

        Args:
            query: the statement.
            parameters: values for its `?` or `$1`, in order, or by name for its `$name`; numpy's numbers too. Where `isolated`,
                they are numbers, texts, truth values, None, and lists and dicts of them: give a date as text, and cast it.
            memory_limit: in bytes, for what the query keeps in memory, and for its answer.
            timeout: in seconds.
            isolated: for a query that somebody else wrote: answer it in a process of its own, which the system holds to the
                limits (see `isolation`) and which opens the store again. It takes a third of a second to start. Otherwise
                DuckDB watches the limits, and a single long expression can go past them.
            files: Parquet files that it may read too, as relations by these names, such as what `student-train evaluate
                --keep-positions` wrote.

        Raises:
            InputError: a limit is too small, a file cannot be read or has the name of a relation, or a parameter cannot be
                passed to another process, or it cannot open the store.
            QueryError: it is not one SELECT statement, would read or write anything else, needs more than its limits, or
                DuckDB cannot run it.
            DamageError: a file it reads is not what was published, or a dump is closed because it is damaged.
            StoreError: every dump is closed.
        """
        remarks: list[str] = []
        if isolated or isinstance(self.storage, ServedStorage):
            try:
                check_answered(self.storage)
            except InputError as error:
                raise InputError(f"SQL over {self.address} cannot be isolated: {error}, or ask without `isolated`") from None
            statement = Statement(query, memory_limit, timeout, parameters, files)
            table = isolated_answer(self.storage, statement, remarks.append)
        else:
            table = run_query(self._dumps, query, memory_limit, timeout, parameters, files)
            remarks = self._dumps.remarks
        for sentence in remarks:
            warnings.warn(sentence, stacklevel=2)
        return table

    def choose_sequences(
        self,
        query: str,
        dumps: str | Sequence[str] | None = None,
        *,
        memory_limit: float = CHOICE_MEMORY_LIMIT,
        timeout: float = CHOICE_TIMEOUT,
        reporter: Reporter = SILENT,
    ) -> ChosenSequences:
        """The sequences that a SELECT statement gives, in a process of its own; its `ordinals` are for `batches`.

        Args:
            query: gives the columns dump and sequence_id, and no others; in a store of one dump sequence_id alone will do.
            dumps: the names of those that are read; None for the only one.
            memory_limit, timeout: in bytes and seconds, for the query.
            reporter: hears of the progress.

        Raises:
            InputError: there is no such dump, or the query gives no sequence, one twice, one that there is not, or one of
                another dump.
            QueryError: the query is refused, has other columns, or DuckDB cannot run it.
            QueryLimitError: it needs more than its limits.
            DamageError, StoreError: as of `sql`.
        """
        return choose_sequences(self._dumps, query, self._names(dumps), memory_limit, timeout, reporter)

    def choose_targets(
        self,
        condition: str,
        dumps: str | Sequence[str] | None = None,
        *,
        memory_limit: float = CHOICE_MEMORY_LIMIT,
        timeout: float = CHOICE_TIMEOUT,
        reporter: Reporter = SILENT,
    ) -> ChosenTargets:
        """The targets that meet a condition in SQL, asked in a process of its own; its `masks` are for `batches`.

        Args:
            condition: over the columns of `positions`, such as "exp(tail_logprob) > 0.05". One that names `rank`, `logprob` or
                `candidates.token_id` is met by a target where any of its candidates meets it. It is not met where its value is
                null.
            dumps: the names of those that are read; None for the only one.
            memory_limit, timeout: in bytes and seconds, for each dump.
            reporter: hears of the progress.

        Raises:
            InputError: there is no such dump, or none of its targets meets the condition.
            QueryError: it is no condition, is refused, or DuckDB cannot run it.
            QueryLimitError: it needs more than its limits.
            DamageError, StoreError: as of `sql`.
        """
        return choose_targets(self._dumps, condition, self._names(dumps), memory_limit, timeout, reporter)

    def check_choice(self, query: str | None, condition: str | None, dumps: str | Sequence[str] | None = None) -> None:
        """Refuse at once a query for `choose_sequences` or a condition for `choose_targets` that cannot be run or has another
        shape (raises as these); what it chooses is not looked at."""
        if query is not None:
            check_query(self._dumps, query, self._names(dumps))
        if condition is not None:
            check_condition(self._dumps, condition, self._names(dumps))

    def _names(self, dumps: str | Sequence[str] | None) -> list[str]:
        """Dumps by name (InputError: there is none of that name)."""
        return [self.dump(name) for name in ([dumps] if dumps is None or isinstance(dumps, str) else dumps)]

    def view(self, dump: str | None = None) -> str:
        """SQL that creates a dump's relations in any DuckDB, over the committed files (see `sql.create_statements`)."""
        return create_statements(self._dumps, self.manifest(dump))

    def export(
        self,
        output: str | Path,
        dump: str | None = None,
        kind: str | None = None,
        where: str | None = None,
        reporter: Reporter = SILENT,
    ) -> int:
        """Write one kind of knowledge of a dump to a new Parquet file of plain columns.

        Args:
            output: the file.
            dump: which dump; None when there is only one.
            kind: which kind of knowledge; None when the dump has only one.
            where: a condition in SQL, such as "is_target AND tail_logprob > -1".
            reporter: hears of the progress.

        Returns:
            how many rows were written.

        Raises:
            InputError: no such dump or kind, or the file cannot be written, or is there already.
            QueryError: the condition is refused, or DuckDB cannot run it.
            DamageError: a file of the store is not what was published.
        """
        manifest = self.manifest(dump)
        kinds = list(manifest.kinds)
        if kind is None and len(kinds) > 1:
            raise InputError(f"name one of the kinds of dump {manifest.dump!r}: {', '.join(kinds)}")
        if kind is not None:
            check_held(manifest, kind)
        return export(self._dumps.only(manifest.dump), kind or kinds[0], Path(output), where, reporter=reporter)

    def export_speculators(self, output: str | Path, dump: str | None = None, reporter: Reporter = SILENT) -> int:
        """Write a dump's hidden states to a folder that `speculators` trains draft models from; see `reading.speculators`.

        Returns:
            how many samples there are.

        Raises:
            InputError: no such dump, it does not hold what is needed, or the folder holds something else or cannot be written.
            DamageError: a file of the store is not what was published.
        """
        manifest = self.manifest(dump)
        name = manifest.dump

        def read(ordinal: int) -> Arrays:
            return self[name, ordinal]

        count = self.sequence_count(name)
        return export_speculators(manifest, self.snapshot(name), count, read, Path(output), reporter=reporter)

    def export_distillkit(self, output: str | Path, dump: str | None = None, reporter: Reporter = SILENT) -> int:
        """Write a dump's candidates to a folder that DistillKit trains students from; see `reading.distillkit`.

        Returns:
            how many sequences there are.

        Raises:
            InputError: no such dump, it holds no positions, or the folder exists already or cannot be written.
            DamageError: a file of the store is not what was published.
        """
        manifest = self.manifest(dump)
        name = manifest.dump
        return export_distillkit(
            manifest, self.sequence_count(name), lambda ordinal: self[name, ordinal], Path(output), reporter=reporter
        )

    def export_dpo(self, output: str | Path, dump: str | None = None, reporter: Reporter = SILENT) -> ExportedPairs:
        """Write the groups of a dump of the starting student as pairs that TRL's DPOTrainer learns from; see `reading.dpo`.

        Raises:
            InputError: no such dump, it has no groups or no positions, no group can be written, or the file exists already or
                cannot be written.
            DamageError: a file of the store is not what was published.
        """
        reader = self._readers.of_dump(dump)
        check_groups([reader.manifest])
        positions_of(reader.manifest)
        groups = Groups(reader.manifest.dump, *reader.scored_documents, AllBut(len(reader)))

        def read(ordinal: int) -> tuple[int, Arrays]:
            number, knowledge = reader.sequence(ordinal, (POSITIONS.name,))
            return number, knowledge[POSITIONS.name]

        return export_dpo(groups, read, Path(output), reporter=reporter)

    def batches(self, dump: Named = None, batch_size: int = ReadPlan.batch_size, **plan: Any) -> Batches:
        """The batches of one rank over one epoch (see `Batches` for what is in one).

        Args:
            dump: which dump, or several, as a list of names or as a mapping from name to weight: the shares of an epoch, which
                has as many sequences as the dumps together (see `reading.order`); None when there is only one.
            batch_size, plan: the fields of `ReadPlan`, such as `seed=1`.

        Raises:
            InputError: no such dump, weight, rank or kind; nothing to read; dumps that do not go together; or one has grown
                since the order was begun.
        """
        return self.read(ReadPlan(batch_size, **plan), dump)

    def read(self, plan: ReadPlan, dump: Named = None) -> Batches:
        """`batches` of a plan."""
        return self._readers.batches(plan, dump)

    def lacking(self, teachers: Iterable[str]) -> tuple[dict[str, int], np.ndarray]:
        """What the dumps of several teachers of one corpus do not have in common.

        Returns:
            how many sequences each dump lacks (see `reading.teachers.TeachersReader`), and the ordinals in the first of those
            that are left out for it, ascending, int64.

        Raises:
            InputError: no such dump, or they are not of one corpus, or have no sequence in common.
        """
        reader = self._readers.of_teachers(teachers)
        return dict(reader.lacking), reader.left_out

    def __len__(self) -> int:
        """How many sequences the store holds, all dumps together (DamageError: one of them is damaged)."""
        self._dumps.check_all_known("sequences are not counted")
        return sum(len(self._readers.of_dump(name)) for name in self.dumps)

    def __getitem__(self, item: int | tuple[str, int]) -> Arrays:
        """One sequence by its ordinal: `store[7]`, or `store["dump", 7]` when there are several dumps.

        Returns:
            the arrays of a batch (see `Batches`) without their first axis.
        """
        dump, ordinal = item if isinstance(item, tuple) else (None, item)
        reader = self._readers.of_dump(dump)
        if ordinal < 0:
            ordinal += len(reader)
        try:
            sequence_id, knowledge = reader.sequence(int(ordinal), tuple(reader.manifest.kinds))
        except InputError as error:
            raise IndexError(str(error)) from None
        sequence: Arrays = {"sequence_id": np.int64(sequence_id)}
        for kind, arrays in knowledge.items():
            if KINDS[kind].per == "sequence":
                sequence |= {name: rows[0] for name, rows in arrays.items()}
                continue
            sequence |= arrays
            mask = "attention_mask" if KINDS[kind].per == "position" else item_mask(kind)
            sequence.setdefault(mask, np.ones(len(next(iter(arrays.values()))), dtype=bool))
        return sequence

    def stored(self, ordinal: int, kind: str, dump: str | None = None) -> tuple[pa.Table, int]:
        """A sequence's rows of a kind as they were kept, and the hash of its token ids in `sequences`.

        Raises:
            InputError: there is no such dump or sequence, or the dump holds no such kind.
            DamageError: what was read is not what was published.
        """
        reader = self._readers.of_dump(dump)
        check_held(reader.manifest, kind)
        return reader.stored(ordinal, kind)

    def shown(self, ordinal: int, dump: str | None = None) -> list[tuple[list[str], list[list[str]]]]:
        """A sequence as a person reads it: for each kind that can be shown, a table's header and rows.

        Raises:
            InputError: there is no such dump or sequence, or it holds no kind that can be shown.
        """
        name = self.dump(dump)
        kinds = [KINDS[kind] for kind in self.manifest(name).kinds]
        shows = [kind.show for kind in kinds if kind.show is not None]
        if not shows:
            raise InputError(
                f"dump {name!r} holds no knowledge that can be shown, only {', '.join(kind.name for kind in kinds)}"
            )
        texts, knowledge = self.tokens(name)["text"].to_pylist(), self[name, ordinal]

        def text(token: int) -> str:
            characters = texts[token] if token < len(texts) else None
            return f"<{token}>" if characters is None else visible(characters.replace(" ", "␣"))

        return [show(knowledge, text) for show in shows]

    def snapshot(self, dump: str | None = None) -> int:
        """A number that stands for a dump's sequences in their order: it is another one when shards were added or lost."""
        return self._readers.of_dump(dump).snapshot

    def sequence_count(self, dump: str | None = None) -> int:
        """How many sequences a dump holds."""
        return len(self._readers.of_dump(dump))

    def removable(self, dump: str) -> str:
        """The folder that `remove` would remove (InputError: there is none of that name)."""
        return dump if dump in self._dumps.closed or self._is_remnant(dump) else self.dump(dump)

    def _is_remnant(self, dump: str) -> bool:
        """Whether a folder is what a removal that was cut off left: tables or records, no manifest, and nothing else."""
        if dump in self.dumps or dump not in self.storage.folders(""):
            return False
        found = {*self.storage.folders(dump), *(entry.name for entry in self.storage.files(dump))}
        return bool(found) and found <= {COMMITS, SEQUENCES, TOKENS_FILE, *KINDS}

    def remove(self, dump: str) -> None:
        """Remove a dump, or a folder that is closed: it disappears at once, then its files are deleted. So is one whose
        removal was cut off, in a bucket say, of which nothing else is known.

        Raises:
            InputError: there is no such dump.
            StoreError: it cannot be removed.
        """
        self.storage.remove_folder(self.removable(dump))
        self._open_again()

    def rename(self, old: str, new: str) -> None:
        """Give a dump another name, where the storage can; what was cut off is finished.

        Raises:
            InputError: there is no such dump, the new name cannot be used or is taken, or the storage cannot rename.
            DamageError, StoreError: a record is damaged, or cannot be read or written.
        """
        if old not in (*self.dumps, *self.closed) and new not in self.closed:  # which may be where a rename was cut off
            self.dump(old)
        rename_dump(self.storage, old, new)
        self._open_again()

    def _open_again(self) -> None:
        self.__dict__.update(KnowledgeStore.open(self.storage, cache_size=self.cache_size).__dict__)
