"""What a teacher wrote, as the rows of a corpus: text or a message, and what is known of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from knowledge_store.format.sequences import CORPUS_TYPES
from teacher_dump.corpus.columns import CUT_OFF, FINISH, STOPPED
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.messages import Turns
from teacher_dump.corpus.rows import BadRow
from teacher_dump.corpus.scan import column_value
from teacher_dump.corpus.tokenisation import CorpusTokenizer
from teacher_dump.generation.plan import NESTED, Plan, written_name
from teacher_dump.generation.prompts import Prompt
from teacher_dump.teachers.protocol import WrittenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 32  # tokens before a text that it is decoded with: some tokenizers drop a space at the beginning
REPLACEMENT = "\ufffd"  # stands for half of a character
MANIFEST_KEY = b"teacher_dump.generation"  # of a file's metadata: the SHA-256 of the manifest it belongs to

# What is kept beside a text for `teacher-dump import`: a value for each token of prompt and text.
KNOWLEDGE = {
    "sequence": pa.list_(pa.int32()),
    "targets": pa.list_(pa.int8()),
    "token_logprobs": pa.list_(pa.float64()),
    "top_ids": pa.list_(pa.list_(pa.int32())),
    "top_logprobs": pa.list_(pa.list_(pa.float64())),
    "tail_logprobs": pa.list_(pa.float64()),
}

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclass(frozen=True)
class TextRows:
    """How texts become rows.

    Attributes:
        tokenizer: of the teacher. corpus: what makes sequences of rows, without a limit.
        plan: of the prompts.
        same: columns that all rows have alike: seed, teacher, template_sha256.
        file_names: of the prompts, as they are called.
        with_likeliest: whether the likeliest tokens are kept at each token of a text.
    """

    tokenizer: PreTrainedTokenizerBase
    corpus: CorpusTokenizer
    plan: Plan
    same: dict[str, Any]
    file_names: list[str]
    with_likeliest: bool

    def row(self, prompt: Prompt, sample: int, text: WrittenText) -> dict[str, Any]:
        """The row of a text."""
        words = self._words(prompt, text)
        completion: str | Turns = words
        if not isinstance(prompt.content, str):
            completion = [{"role": "assistant", "content": words}]
        finish = STOPPED if text.stopped else CUT_OFF
        place = prompt.start
        row: dict[str, Any] = {
            "prompt": self._kept_messages(prompt.content),
            "completion": completion,
            "sample": sample,
            "logprob": float(text.logprobs.sum()),
            "tokens": text.token_ids.tolist(),
            FINISH: finish,
            "exact": self._exact(prompt, completion, finish, text.token_ids),
            "prompt_file": self.file_names[place.file] if self.file_names else None,
            "prompt_row": place.row,
            **self.same,
        }
        for name, value in (prompt.arguments or {}).items():
            if name == "tools":
                row["tools"] = json.dumps(value, ensure_ascii=False)
        others = {name: value for name, value in (prompt.arguments or {}).items() if name != "tools"}
        if others:
            row["chat_template_kwargs"] = json.dumps(others, ensure_ascii=False)
        for name, value in (prompt.columns or {}).items():
            written = written_name(name)
            kind = self.plan.columns[written]
            nested = kind == NESTED and value is not None
            row[written] = json.dumps(value, ensure_ascii=False, default=str) if nested else column_value(value, kind)
        if text.likeliest is not None:
            assert prompt.token_ids is not None
            row |= _knowledge(prompt.token_ids, text)
        return row

    def _words(self, prompt: Prompt, text: WrittenText) -> str:
        """A text without the token that ended it, and without half a character where it was cut off."""
        assert prompt.token_ids is not None
        context = prompt.token_ids[-CONTEXT:].tolist() if prompt.content else []
        written = text.token_ids[:-1] if text.stopped else text.token_ids
        before, whole = (
            self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (context, [*context, *written.tolist()])
        )
        if not whole.startswith(before):  # the context ends within a character
            before, whole = "", self.tokenizer.decode(written.tolist(), clean_up_tokenization_spaces=False)
        words = str(whole[len(before) :])
        return words if text.stopped else words.rstrip(REPLACEMENT)

    def _exact(self, prompt: Prompt, completion: str | Turns, finish: str, token_ids: np.ndarray) -> bool:
        """Whether the row, read as a corpus, has as its targets the very tokens that were written."""
        document = Document(
            *(0, 0, 1, 0, 0),
            prompt=prompt.content,
            completion=completion,
            template_arguments=prompt.arguments,
            finish=finish,
        )
        try:
            [sequence] = self.corpus.sequences(document)
        except BadRow:
            return False
        return bool(np.array_equal(sequence.token_ids[sequence.is_target], token_ids))

    def _kept_messages(self, content: str | Turns) -> Any:
        """A prompt as its column has it."""
        return content if isinstance(content, str) or self.plan.plain_messages else json.dumps(content, ensure_ascii=False)

    def write(self, rows: list[dict[str, Any]], file: BinaryIO, manifest_sha256: str) -> None:
        """Write rows as a Parquet file."""
        schema = self._schema().with_metadata({MANIFEST_KEY: manifest_sha256.encode()})
        columns = [_column([row.get(field.name) for row in rows], field.type) for field in schema]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), file, compression="zstd")

    def _schema(self) -> pa.Schema:
        plan = self.plan
        prompt = pa.string() if not plan.messages else _MESSAGES if plan.plain_messages else pa.json_()
        fields = {
            "prompt": prompt,
            "completion": _MESSAGES if plan.messages else pa.string(),
            "sample": pa.int32(),
            "seed": pa.int64(),
            "logprob": pa.float64(),
            "tokens": pa.list_(pa.int32()),
            FINISH: pa.string(),
            "exact": pa.bool_(),
            "teacher": pa.string(),
            "template_sha256": pa.string(),
            "prompt_file": pa.string(),
            "prompt_row": pa.int64(),
        }
        if plan.arguments:
            fields |= {"tools": pa.string(), "chat_template_kwargs": pa.string()}
        if self.with_likeliest:
            fields |= KNOWLEDGE
        fields |= {name: pa.json_() if kind == NESTED else CORPUS_TYPES[kind] for name, kind in plan.columns.items()}
        return pa.schema(list(fields.items()))


def _knowledge(prompt: np.ndarray, text: WrittenText) -> dict[str, Any]:
    """What a teacher thought at each token of a text, one value for each token of prompt and text; nothing at the prompt's."""
    assert text.likeliest is not None
    blank = [np.nan] * len(prompt)
    none: list[list[Any]] = [[]] * len(prompt)
    # Beneath float32's rounding of one, what others leave of it is not known to be anything.
    remainders = np.log(np.maximum(1 - np.exp(text.likeliest.logprobs).sum(axis=1), np.finfo(np.float32).eps))
    return {
        "sequence": [*prompt.tolist(), *text.token_ids.tolist()],
        "targets": [*[0] * len(prompt), *[1] * len(text.token_ids)],
        "token_logprobs": [*blank, *text.logprobs.tolist()],
        "top_ids": [*none, *text.likeliest.ids.tolist()],
        "top_logprobs": [*none, *text.likeliest.logprobs.tolist()],
        "tail_logprobs": [*blank, *(remainders if text.tails is None else text.tails).tolist()],
    }


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)
