"""Documents to sequences of token ids, shaped as TRL's SFTTrainer shapes them (rows, targets, end of sequence).

* `text`: every token counts; an end-of-sequence token closes the text; a long text becomes consecutive windows, each opened
  by the tokens that the tokenizer puts before a text (a beginning-of-sequence token, where it has one).
* `prompt` + `completion` as text: the completion's tokens count, from where prompt and prompt + completion differ as token ids.
* `prompt` + several `completions`: a window for each, which is what a row of `prompt` and this one as `completion` becomes.
* token ids: as they are, with nothing added; the row says which count.
* `messages`, and `prompt` + `completion` as messages: what the assistant writes counts, of the completion alone where there is
  one (see `chat`).

What a model wrote and what was cut off (`finish` is `length`) has no end: nothing that would close it is a target.

An answer of a group is never cut. What else is longer than `max_length` and no plain text is cut at its end, as TRL does, and
its sequence says how much was lost; or it is not used, if that is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import template_sha256
from knowledge_store.format.records import json_sha256
from knowledge_store.tokenizer import opening_tokens
from teacher_dump.corpus.chat.messages import REASONING
from teacher_dump.corpus.chat.options import ChatOptions, today
from teacher_dump.corpus.chat.template import ChatTemplate
from teacher_dump.corpus.columns import CUT_OFF
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.messages import Turns, message_texts
from teacher_dump.corpus.rows import BadRow, EmptyRow, LongRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenSequence:
    """What the teacher sees at once.

    Attributes:
        document: where it comes from; window: its place among the document's sequences.
        token_ids: int64 (L,), L at least 2.
        is_target: bool (L,); never true at position 0, which nothing predicts.
        tokens_cut: how many tokens of the document come after its end; targets_cut: those of them that are targets.
        score: what it is worth beside the other answers of its group; None where nobody says.
        dropped_reasoning: how many messages' reasoning the chat template left out, as it does in turns before the last.
    """

    document: Document
    window: int
    token_ids: np.ndarray
    is_target: np.ndarray
    tokens_cut: int = 0
    targets_cut: int = 0
    dropped_reasoning: int = 0
    score: float | None = None

    @property
    def truncated(self) -> bool:
        """Whether the document continues after max_length."""
        return self.tokens_cut > 0


class CorpusTokenizer:
    """Turns documents into sequences of at most `max_length` tokens.

    Args:
        tokenizer: of the teacher.
        max_length: in tokens.
        cut: whether what is longer loses its end, or cannot be used.
        chat: how conversations are rendered; as today without it.
        with_context: the kinds of knowledge, if any, that need a context before the targets: documents without are no use.

    Raises (on construction):
        InputError: max_length leaves no room for text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        cut: bool = True,
        chat: ChatOptions | None = None,
        with_context: tuple[str, ...] = (),
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.cut = cut
        self._with_context = with_context
        self._opening = opening_tokens(tokenizer)
        self._opened_twice = False
        self._chat = ChatTemplate(tokenizer, chat or ChatOptions(today()))
        if max_length < len(self._opening) + 2:
            raise InputError(f"--max-length {max_length} leaves no room: give at least {len(self._opening) + 2}")

    @property
    def notes(self) -> list[str]:
        """What a person should know of the documents so far, a sentence each."""
        if not self._opened_twice:
            return self._chat.notes
        token = self.tokenizer.convert_ids_to_tokens(self._opening[-1])
        return [
            *self._chat.notes,
            f"some texts begin with {token}, which the tokenizer puts before every text, so that it stands there twice: take it"
            " out of the corpus, unless the teacher is to see that",
        ]

    @cached_property
    def _vocabulary(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_vocab().values())

    def sequences(self, document: Document) -> list[TokenSequence]:
        """The sequences of a document; none for a part of a text that has no tokens.

        Raises:
            BadRow: the document cannot be used; says why. LongRow where it is too long for that, EmptyRow where it has nothing
                to learn from.
        """
        try:
            sequences = self._sequences(document)
        except (BadRow, InputError, MemoryError):
            raise
        except Exception as error:  # a row of odd types stops nothing but itself
            raise BadRow(f"it cannot be made into tokens ({type(error).__name__}: {' '.join(str(error).split())})") from error
        if not sequences and document.part == 0:
            raise EmptyRow
        return sequences

    def _sequences(self, document: Document) -> list[TokenSequence]:
        if document.problem is not None:
            raise BadRow(document.problem)
        if document.text is not None:
            if document.is_whole and not document.text.strip():
                return []  # white space alone is as good as no text
            self._check_context(np.ones(1, bool))
            return self._windows(document, document.text)
        if document.completions is not None:
            return self._group(document, document.completions)
        if document.token_ids is not None:
            return self._answer(document, *self._given_tokens(document))
        if document.finish is not None and document.completion is not None and not _has_words(document.completion):
            return []  # a model ended at once: nothing of it is to be learned, and nothing is wrong with the corpus
        cut_off = document.finish == CUT_OFF
        if isinstance(document.prompt, str) and isinstance(document.completion, str):
            return self._answer(document, *self._completion(document.prompt, document.completion, cut_off))
        messages, completion_from = document.messages or [], 0
        if isinstance(document.prompt, list) and isinstance(document.completion, list):
            messages, completion_from = [*document.prompt, *document.completion], len(document.prompt)
        conversation = self._chat.tokens(messages, document.template_arguments, completion_from, cut_off)
        return self._answer(document, conversation.token_ids, conversation.is_target, conversation.dropped_reasoning)

    def _group(self, document: Document, completions: tuple[str | Turns, ...]) -> list[TokenSequence]:
        """The sequences of a group, one for each answer."""
        scores = document.scores or (None,) * len(completions)
        group: list[TokenSequence] = []
        for window, (completion, score) in enumerate(zip(completions, scores, strict=True)):
            which = f"answer {window + 1} of {len(completions)}"
            try:
                found = self._sequences(replace(document, completion=completion, completions=None))
            except LongRow:
                raise
            except BadRow as problem:
                raise BadRow(f"{problem}, in {which}", problem.reason) from problem
            if not found:
                raise BadRow(f"an answer of a group has nothing to learn from: {which}")
            [sequence] = found
            if sequence.truncated:
                raise BadRow(
                    f"an answer of a group would be cut ({which} has {len(sequence.token_ids) + sequence.tokens_cut:,} tokens,"
                    f" and --max-length is {self.max_length:,}): answers that are cut are not compared; give a larger"
                    " --max-length, or leave such groups out with --too-long skip"
                )
            group.append(replace(sequence, document=document, window=window, score=score))
        if all(np.array_equal(sequence.token_ids, group[0].token_ids) for sequence in group):
            raise BadRow("its answers are all the same tokens, so none is better than another")
        return group

    def _answer(
        self, document: Document, token_ids: np.ndarray, is_target: np.ndarray, dropped_reasoning: int = 0
    ) -> list[TokenSequence]:
        """The sequence of a document that has context and targets."""
        if len(token_ids) > self.max_length and not self.cut:
            raise LongRow(len(token_ids), self.max_length)
        first = int(np.argmax(is_target)) if is_target.any() else len(token_ids)
        if first >= self.max_length:
            raise BadRow(
                f"the prompt leaves no room for what follows it (it has {first} tokens, and --max-length is {self.max_length})"
            )
        sequence = self._sequence(document, 0, token_ids, is_target, dropped_reasoning)
        if not sequence.is_target.any():
            return []
        self._check_context(is_target[: np.flatnonzero(sequence.is_target)[-1]])
        return [sequence]

    def _check_context(self, is_target: np.ndarray) -> None:
        """Make sure that some token before the last target is none itself, where that is needed (BadRow)."""
        if self._with_context and is_target.all():
            raise BadRow(
                f"no context stands before its targets (--kind {self._with_context[0]} asks which of its tokens decided them:"
                " give rows of prompt and completion, or messages)"
            )

    def _sequence(
        self, document: Document, window: int, token_ids: np.ndarray, is_target: np.ndarray, dropped_reasoning: int = 0
    ) -> TokenSequence:
        kept = is_target[: self.max_length].copy()
        kept[:1] = False
        cut = max(len(token_ids) - self.max_length, 0)
        targets_cut = int(is_target[self.max_length :].sum())
        return TokenSequence(document, window, token_ids[: self.max_length], kept, cut, targets_cut, dropped_reasoning)

    def _encode(self, text: str) -> list[int]:
        # The tokenizer warns of texts longer than its model's context; windows take care of that.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _encode_continuation(self, text: str) -> list[int]:
        """The tokens of a text that goes on after a line's end: some tokenizers put a space before what they think a text's
        beginning."""
        line_end = self._encode("\n")
        token_ids = self._encode("\n" + text)
        follows = token_ids[: len(line_end)] == line_end
        return token_ids[len(line_end) :] if follows and len(token_ids) > len(line_end) else self._encode(text)

    def _opened(self, token_ids: list[int]) -> list[int]:
        """A text's tokens with those that the tokenizer puts before it."""
        self._opened_twice |= bool(self._opening) and token_ids[:1] == self._opening[-1:]
        return [*self._opening, *token_ids]

    def _close(self, token_ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return token_ids if end is None or token_ids[-1:] == [end] else [*token_ids, end]

    def _windows(self, document: Document, text: str) -> list[TokenSequence]:
        if not text:
            return []
        token_ids = self._encode(text) if document.part == 0 else self._encode_continuation(text)
        if document.last_part and document.finish != CUT_OFF:
            token_ids = self._close(token_ids)
        room = self.max_length - len(self._opening)
        starts = list(range(0, len(token_ids), room))
        if len(self._opening) + len(token_ids) - starts[-1] < 2 < room and len(starts) > 1:
            starts[-1] -= 1  # one token alone has nothing to be predicted from: it takes the one before it along
        ends = [*starts[1:], len(token_ids)]
        windows = [self._opened(token_ids[start:end]) for start, end in zip(starts, ends, strict=True)]
        return [
            self._sequence(document, window, np.array(ids, np.int64), np.ones(len(ids), bool))
            for window, ids in enumerate(windows)
            if len(ids) > 1
        ]

    def _given_tokens(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        assert document.token_ids is not None and document.is_target is not None
        for number, token in enumerate(document.token_ids, 1):
            if token not in self._vocabulary:
                raise BadRow(
                    f"`input_ids` has a token that the teacher's tokenizer does not have ({token} at token {number}; it has"
                    f" {len(self._vocabulary):,} tokens)"
                )
        return np.array(document.token_ids, np.int64), np.array(document.is_target, bool)

    def prompt_tokens(self, prompt: str | Turns, arguments: dict[str, Any] | None = None) -> np.ndarray:
        """The tokens that a completion of a prompt is predicted from, int64 (T,).

        Args:
            prompt: text, or messages of which the assistant is asked to answer the last.
            arguments: for the chat template, as a document has them.

        Raises:
            BadRow: the prompt cannot be used. InputError: the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return np.array([*self._opening, *self._encode(prompt)], np.int64)
        return np.array(self._encode(self._chat.prompt(prompt, arguments)), np.int64)

    def last_target(self, messages: Turns) -> int | None:
        """The id of the last token that a conversation teaches, where it is one of those that stand for no text.

        Raises:
            BadRow: the conversation cannot be used.
        """
        conversation = self._chat.tokens(messages)
        last = int(conversation.token_ids[conversation.is_target][-1])
        return last if last in self.tokenizer.added_tokens_decoder else None

    def _completion(self, prompt: str, completion: str, cut_off: bool) -> tuple[np.ndarray, np.ndarray]:
        prompt_ids = [*self._opening, *self._encode(prompt)]
        token_ids = self._opened(self._encode(prompt + completion))
        if not cut_off:
            token_ids = self._close(token_ids)
        length = min(len(prompt_ids), len(token_ids))
        differing = np.array(prompt_ids[:length]) != np.array(token_ids[:length])
        prompt_length = int(np.argmax(differing)) if differing.any() else length
        return np.array(token_ids, np.int64), np.arange(len(token_ids)) >= prompt_length


def _has_words(completion: str | Turns) -> bool:
    """Whether a completion has more than white space, or messages with more than that, such as calls."""
    if isinstance(completion, str):
        return bool(completion.strip())
    others = (message.get(name) for message in completion for name in (*REASONING, "tool_calls", "function_call"))
    return any(map(str.strip, message_texts(completion))) or any(others)


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What goes into the manifest about a tokenizer: the hash of its vocabulary (token → id), its size and special ids."""
    vocabulary = tokenizer.get_vocab()
    return {
        "vocabulary_sha256": json_sha256(vocabulary),
        "size": len(vocabulary),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "chat_template_sha256": template_sha256(tokenizer.chat_template),
    }
