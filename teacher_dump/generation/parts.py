"""The files of a folder of texts: which are missing, and each written and published at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.errors import DamageError
from knowledge_store.format.records import json_sha256
from knowledge_store.reporter import Reporter
from knowledge_store.storage import Storage
from teacher_dump.corpus.generated import missing_parts, part_name
from teacher_dump.dumping.batches import enough_memory, find_batching
from teacher_dump.generation.configuration import GenerateConfig
from teacher_dump.generation.plan import Plan
from teacher_dump.generation.prompts import Prompt, PromptReader
from teacher_dump.generation.report import GenerateReport, Tally
from teacher_dump.generation.texts import MANIFEST_KEY, TextRows
from teacher_dump.teachers.protocol import TextRequest, Writing

if TYPE_CHECKING:
    from teacher_dump.teachers.protocol import Teacher


def text_key(seed: int, number: int, sample: int) -> int:
    """The key of a text's random generator, 64 bits, by the number of its prompt's row."""
    return int(np.random.SeedSequence([seed, number, sample]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Writer:
    """Writes the files of a folder.

    Attributes:
        config: of the command.
        manifest: of the folder.
        reader: of its prompts.
        teacher: that writes.
        storage: the folder.
    """

    config: GenerateConfig
    manifest: dict[str, Any]
    reader: PromptReader
    teacher: Teacher
    storage: Storage

    def write(self, rank: int, world_size: int, reporter: Reporter) -> GenerateReport:
        """Write what is missing of a rank's files (see `run.generate`)."""
        self.storage.remove_leftovers("")
        share = range(rank, len(self._plan.parts), world_size)
        missing = set(missing_parts(self.config.output, self.manifest))
        self._check_parts(missing)
        wanted = [number for number in share if number in missing]
        longest = self._plan.longest + self.config.max_new_tokens
        alone = bool(wanted) and find_batching(self.config, self.teacher, longest, reporter).rule != "any"
        tally, started = Tally(), time.monotonic()
        with reporter.progress("generating", sum(map(self._texts_of, wanted)), "texts") as advance:
            for number in wanted:
                rows: list[tuple[tuple[int, int], dict[str, Any]]] = []
                for batch in self._batches(number, 1 if alone else self.config.batch_size):
                    rows += batch
                    tally.add(row for _, row in batch)
                    advance(len(batch), **tally.figures(time.monotonic() - started))
                advance(self._texts_of(number) - len(rows))  # of rows that were left out
                self._publish(number, [row for _, row in sorted(rows, key=lambda placed: placed[0])])
        return GenerateReport(
            output=self.config.output,
            files=len(wanted),
            files_existing=len(share) - len(wanted),
            files_missing=len(missing_parts(self.config.output, self.manifest)),
            files_planned=len(self._plan.parts),
            seconds=time.monotonic() - started,
            left_out=self._plan.left_out,
            **tally.counts,
        )

    @cached_property
    def _plan(self) -> Plan:
        return Plan.from_record(self.manifest)

    @cached_property
    def _sha256(self) -> str:
        return json_sha256(self.manifest)

    @cached_property
    def _rows(self) -> TextRows:
        settings, template = self.manifest["settings"], self.manifest["settings"]["template"]
        same = {
            "seed": settings["seed"],
            "teacher": self.teacher.description["name"],
            "template_sha256": None if template is None else template["sha256"],
        }
        names = [file["name"] for file in settings["prompts"]]
        kept = self.config.keep_top_k is not None
        return TextRows(self.teacher.tokenizer, self.reader.tokenizer, self._plan, same, names, kept)

    @cached_property
    def _writing(self) -> Writing:
        kept = min(self.config.keep_top_k or 0, self.teacher.vocabulary_size)
        return Writing(self.config.temperature, self.config.max_new_tokens, tuple(self.manifest["stop_tokens"]), kept)

    def _texts_of(self, number: int) -> int:
        """How many texts a file has, where all of its prompts can be used."""
        size = self.config.shard_size
        return min(size, self._plan.rows - number * size) * self.config.samples

    def _check_parts(self, missing: set[int]) -> None:
        """Make sure that the files that are there are of this folder (DamageError: one is not)."""
        for number in range(len(self._plan.parts)):
            path = self.config.output / part_name(number)
            if number in missing:
                continue
            try:
                found = (pq.read_metadata(path).metadata or {}).get(MANIFEST_KEY)
            except (pa.ArrowException, OSError):
                found = None
            if found != self._sha256.encode():
                raise DamageError(f"{path} is damaged, or of another folder: remove it, and it is written again")

    def _batches(self, number: int, size: int) -> Iterator[list[tuple[tuple[int, int], dict[str, Any]]]]:
        """The rows of a file, some at a time, each with its place: the number of its prompt, and the sample."""
        start = self._plan.parts[number]
        prompts: list[Prompt] = [
            prompt for prompt in islice(self.reader.prompts(start), self.config.shard_size) if prompt.token_ids is not None
        ]
        # Texts of prompts that are about as long go together, so that little of a batch is padding.
        prompts.sort(key=lambda prompt: -len(_tokens(prompt)))
        texts = [(prompt, sample) for prompt in prompts for sample in range(self.config.samples)]
        for begin in range(0, len(texts), size):
            batch = texts[begin : begin + size]
            requests = [
                TextRequest(_tokens(prompt), text_key(self.config.seed, prompt.number, sample)) for prompt, sample in batch
            ]
            with enough_memory(self.config, [request.prompt for request in requests]):
                written = self.teacher.write(requests, self._writing)
            yield [
                ((prompt.number, sample), self._rows.row(prompt, sample, text))
                for (prompt, sample), text in zip(batch, written, strict=True)
            ]

    def _publish(self, number: int, rows: list[dict[str, Any]]) -> None:
        self.storage.create(part_name(number), lambda file: self._rows.write(rows, file, self._sha256))


def _tokens(prompt: Prompt) -> np.ndarray:
    assert prompt.token_ids is not None
    return prompt.token_ids
