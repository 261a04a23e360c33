"""Whether a dump that exists is the one that is asked for; what differs is named as the command names it. No torch here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from knowledge_store.errors import MismatchError
from knowledge_store.format.manifest import Manifest, in_words
from knowledge_store.reporter import SILENT, Reporter
from knowledge_store.storage import Storage
from teacher_dump.configuration import DumpConfig
from teacher_dump.corpus.sources import corpus_record
from teacher_dump.dumping.request import chat_asked, parameters_asked, plan_record
from teacher_dump.extraction import EXTRACTORS

_NAMES = {
    "plan.max_length": "--max-length",
    "plan.too_long": "--too-long",
    "plan.shard_size": "--shard-size",
    "plan.chat.date": "--template-date",
    "plan.chat.train_on": "--train-on",
    "plan.chat.template_sha256": "the text of --chat-template",
    "teacher.dtype": "--dtype",
    "teacher.quantize": "--quantize",
    "teacher.engine_version": "the version of the server's engine (engine_version)",
    "teacher.served_name": "the name that the model is served by (served_name)",
}


def check_options(config: DumpConfig, storage: Storage, existing: Manifest, *, reporter: Reporter = SILENT) -> None:
    """Make sure that options and corpus are those that a dump was made with, as far as no teacher is needed to say so.

    Raises:
        MismatchError: they are not; names what differs.
        InputError: a file of the corpus, or one that an option names, cannot be used.
    """
    kinds = {name: parameters_asked(config, name).to_record() for name in config.kinds}
    dated = config.template_date is not None or "date" in existing.plan.get("chat", {})
    asked = plan_record(config, chat_asked(config, existing).record(dated))
    corpus = {"files": corpus_record(config.corpus, reporter=reporter), "columns": config.column_names}
    check_same(storage, existing, replace(existing, kinds=kinds, corpus=corpus, plan={**existing.plan, **asked}))


def check_same(storage: Storage, existing: Manifest, asked: Manifest) -> None:
    """Make sure that a dump that exists is the one that is asked for.

    Raises:
        MismatchError: it is not; names what differs.
    """
    sentences = _sentences(existing, asked)
    if sentences:
        raise MismatchError(
            f"dump {existing.dump!r} in {storage.address} was made differently: {'; '.join(sentences)}."
            " Use what it was made with, or give this dump another --name"
        )


def check_alike(storage: Storage, last: Manifest, asked: Manifest) -> None:
    """Make sure that a dump is made as the last one of its family was, of whatever corpus.

    Raises:
        MismatchError: it is not; names what differs.
    """
    sentences = _sentences(last, replace(asked, corpus={**asked.corpus, "files": last.corpus["files"]}))
    if sentences:
        raise MismatchError(
            f"dump {last.dump!r} in {storage.address} was made differently: {'; '.join(sentences)}."
            " Append with what it was made with, or begin another family with --name"
        )


def _sentences(existing: Manifest, asked: Manifest) -> list[str]:
    changes = existing.changes(asked)
    if "plan.max_length" in changes:
        changes.pop("plan.part_characters", None)  # which follows from it
    changes.pop("plan.chat.template", None)  # its hash says so
    sentences = []
    for kind in sorted(existing.kinds.keys() ^ asked.kinds.keys()):
        sentences.append(f"--kind {kind} was {'given and is not now' if kind in existing.kinds else 'not given and is now'}")
        # What that kind's options are says nothing more.
        changes = {name: values for name, values in changes.items() if not f"{name}.".startswith(f"kinds.{kind}.")}
    sentences += [_sentence(name, *values, existing, asked) for name, values in changes.items()]
    return list(dict.fromkeys(sentences))


def _sentence(name: str, old: Any, new: Any, existing: Manifest, asked: Manifest) -> str:
    if file := re.fullmatch(r"corpus\.files\[(\d+)\]\..*", name):
        index = int(file[1])
        before, after = existing.corpus["files"], asked.corpus["files"]
        if index >= len(before):
            return f"corpus file {after[index]['name']} was not part of it"
        if index >= len(after):
            return f"corpus file {before[index]['name']} is missing"
        grown = " (--append dumps what is new, in a file of its own)" if after[index]["bytes"] > before[index]["bytes"] else ""
        return f"corpus file {after[index]['name']} has other contents{grown}"
    if (part := name.removeprefix("corpus.columns.")) != name:
        old, new = (f"nothing of {part}" if value is None else f"{part}={value}" for value in (old, new))
        return f"--columns said {old} and now says {new}"
    if name.startswith("teacher.files."):
        return f"the teacher's file {name.removeprefix('teacher.files.')} has other contents"
    if name.startswith("teacher.fingerprint"):
        return "the server's answers to fixed prompts are others, so that its model is another one"
    label = _NAMES.get(name) or in_words(name)
    for kind, extractor in EXTRACTORS.items():
        parameter = name.removeprefix(f"kinds.{kind}.")
        label = extractor.option_names.get(parameter, label) if parameter != name else label
        absent = extractor.absent_values.get(parameter) if parameter != name else None
        old, new = (absent if value is None else value for value in (old, new))
    old, new = ("absent" if value is None else str(value) for value in (old, new))
    return f"{label} was {_short(old)} and is now {_short(new)}"


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:12]}…"
