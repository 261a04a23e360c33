"""Looking through a corpus before its teacher is loaded: whether its rows can be used, as far as the tokenizer can tell."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from knowledge_store.errors import InputError
from knowledge_store.format.corpus_counts import CorpusCounts, LeftOut
from knowledge_store.format.manifest import Manifest
from knowledge_store.quantities import counted, percentage
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.configuration import CorpusOptions, DumpConfig, EstimateConfig
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.documents import problem_text
from teacher_dump.corpus.rows import LongRow
from teacher_dump.corpus.scan import Scanner, columns_sentence, scan
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.dumping.request import chat_asked, check_length, corpus_groups
from teacher_dump.dumping.shared_scan import Sharing, shared_scan
from teacher_dump.extraction import kinds_with_context
from teacher_dump.teachers.files import find_folder, stated_sizes
from teacher_dump.teachers.opening import check_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_dump.teachers.protocol import Teacher


def inspect_before_loading(
    config: DumpConfig,
    existing: Manifest | None,
    teacher: Teacher | None,
    chat: ChatOptions,
    sharing: Sharing | None = None,
    *,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Make sure that the rows of a corpus can be used, and as many of them as is asked for.

    Args:
        config: of the dump.
        existing: the manifest of a dump that is resumed or repaired, which knows.
        teacher: the one that is loaded already; without one its tokenizer is loaded.
        chat: how conversations are rendered.
        sharing: with other workers that begin the dump; without it, this one looks through all of the corpus.
        reporter: hears of progress.

    Returns:
        `derived` of the manifest.

    Raises:
        InputError: the corpus cannot be used, or a row cannot; names it.
        DamageError: what was found in a part of the corpus is damaged.
        StoreError: the store cannot be written.
    """
    if existing is not None:
        if existing.counts is not None:
            check_counts(config, existing.counts)
        return existing.derived
    if teacher is None:
        check_device(config.loading)
    tokenizer = teacher_tokenizer(config, teacher, weights=config.teacher_url is None)
    return look_through(config, tokenizer, chat, sharing, reporter=reporter)


def teacher_tokenizer(config: CorpusOptions, teacher: Teacher | None, weights: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of the teacher: of the one that is loaded, or loaded alone.

    Args:
        config: names the teacher.
        teacher: the one that is loaded.
        weights: whether a hub id's weights are going to be needed too.

    Raises:
        InputError: it cannot be used, or sequences are longer than the teacher knows positions.
    """
    if teacher is not None:
        check_length(config, teacher.description)
        return teacher.tokenizer
    from teacher_dump.teachers.tokenizer import load_tokenizer

    folder = find_folder(config.teacher, config.gguf_file, config.revision, weights=weights)
    if (folder / "config.json").is_file():
        check_length(config, stated_sizes(str(folder), config.gguf_file))
    return load_tokenizer(str(folder), config.gguf_file)


def corpus_tokenizer(
    config: CorpusOptions, tokenizer: PreTrainedTokenizerBase, chat: ChatOptions | None = None
) -> CorpusTokenizer:
    """What makes sequences of documents as the options say; `chat` is how conversations are rendered, where a dump knows.

    Raises:
        InputError: --max-length leaves no room, or the file of the chat template cannot be used.
    """
    with_context = kinds_with_context(config.kinds) if isinstance(config, EstimateConfig) else ()
    return CorpusTokenizer(tokenizer, config.max_length, config.too_long == "cut", chat or chat_asked(config), with_context)


def look_through(
    config: DumpConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatOptions,
    sharing: Sharing | None = None,
    *,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Read and tokenise every row of a corpus.

    Args:
        config: of the dump.
        tokenizer: of the teacher.
        chat: how conversations are rendered.
        sharing: with other workers that begin the dump; nothing is written without it.
        reporter: hears of progress.

    Returns:
        `derived` of the manifest.

    Raises:
        InputError: the corpus cannot be used, or a row cannot; names it.
        DamageError: what was found in a part of the corpus is damaged.
        StoreError: the store cannot be written.
    """
    scanner = Scanner(
        config.corpus,
        corpus_tokenizer(config, tokenizer, chat),
        config.part_characters,
        config.too_long,
        config.column_names,
        stated_sizes(config.teacher, config.gguf_file).get("vocabulary_size"),
        bool(corpus_groups(config)),
    )
    if sharing is not None and sharing.pays(len(scanner.pieces)):
        found = shared_scan(config, scanner, chat, sharing, reporter)
        if isinstance(found, Manifest):  # another worker has put it together meanwhile
            if found.counts is not None:
                check_counts(config, found.counts)
            return found.derived
        scanned, notes = found
    else:
        with reporter.progress("looking through the corpus", sum(scanner.sizes)) as advance:
            scanned, notes = scan(scanner, config.shard_size, advance)
    check_counts(config, scanned.counts)
    for note in filter(None, (*notes, columns_sentence(scanned.columns_read, scanned.columns))):
        reporter.note(note)
    return {
        "documents": scanned.documents,
        "counts": scanned.counts.to_record(),
        "columns": scanned.columns,
        "shards": [asdict(start) for start in scanned.shards],
    }


def check_counts(config: DumpConfig, counts: CorpusCounts) -> None:
    """Make sure that no row stops a dump, that some can be used, and that not too many are left out.

    Raises:
        InputError: otherwise; names the first of the rows.
    """
    refused = [(reason, left) for reason, left in counts.by_reason if _stops(config, reason, left)]
    if refused:
        first = min((left for _, left in refused), key=lambda left: (left.file, left.row))
        others = [(reason, left.rows - (left is first)) for reason, left in refused]
        reasons = "; ".join(f"{rows:,} {reason}" for reason, rows in others if rows)
        number = sum(rows for _, rows in others)
        more = f" ({counted(number, 'more row', 'more rows')} cannot be used: {reasons})" if number else ""
        raise InputError(f"{_place(config, first)}{more}. {ways_out(*(reason for reason, _ in refused))}")
    if not counts.positions:
        places = [_place(config, left) for left in sorted(counts.left_out.values(), key=lambda left: (left.file, left.row))]
        raise InputError(": ".join(["the corpus has no row that can be used", *places[:1]]))
    if counts.rows_left_out > config.max_skipped * counts.rows:
        reasons = "; ".join(f"{left.rows:,} {reason} (the first: {_place(config, left)})" for reason, left in counts.by_reason)
        raise InputError(
            f"{counts.rows_left_out:,} of {counted(counts.rows, 'row', 'rows')} would be left out"
            f" ({percentage(counts.rows_left_out / counts.rows)}), and --max-skipped allows"
            f" {percentage(config.max_skipped)}: {reasons}. Repair the corpus, or allow more"
        )


def _stops(config: DumpConfig, reason: str, left: LeftOut) -> bool:
    if reason == LongRow.REASON:
        return config.too_long == "refuse"
    return left.bad and not config.skip_bad_rows


def _place(config: DumpConfig, left: LeftOut) -> str:
    return problem_text(config.corpus, left.file, left.row, left.problem)


def ways_out(*reasons: str) -> str:
    """What can be done about rows that stop what is done with a corpus, for some reasons: a sentence."""
    ways = ["repair the corpus"]
    if LongRow.REASON in reasons:
        ways = ["give a larger --max-length", "use --too-long cut or skip"]
    if set(reasons) - {LongRow.REASON}:
        ways.append("pass --skip-bad-rows to leave bad rows out")
    text = ", or ".join([", ".join(ways[:-1]), ways[-1]]) if len(ways) > 1 else ways[0]
    return text[0].upper() + text[1:]
