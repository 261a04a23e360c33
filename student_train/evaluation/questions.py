"""Multiple-choice questions from a file, as text and as token ids.

A line of the file is an object with `question` (text), `options` (two texts or more) and `answer`: the index of the right
option counted from 0, its letter (A for the first), or the option itself; other columns are left alone. The two layouts are

    Question: {question}            Question: {question}
    A. {option}                     Answer:
    B. {option}
    Answer:

followed by " A" (`letter`, on the left), or by " {option}" (`text`, on the right: the options are not listed, as in a cloze,
since small models cannot tell what a letter stands for). `corpus_row` gives the same layout as a row to dump and train on,
and the token ids are those that such a row is dumped with: prompt and completion are cut into tokens together.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_store.errors import InputError
from knowledge_store.tokenizer import opening_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = string.ascii_uppercase
ANSWER_AS = ("letter", "text")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: what is asked.
        options: at least two, all different.
        answer: index of the right one.
        place: where it was read, for messages.
    """

    text: str
    options: tuple[str, ...]
    answer: int
    place: str = "a question"


@dataclass(frozen=True)
class TokenisedQuestion:
    """A question as token ids.

    Attributes:
        context: what all options have before them, a beginning-of-sequence token included; at least one token. Where the
            space before a letter is a token of its own, it is part of the context.
        completions: for each option what follows the context, at least one token, no end-of-sequence token.
        answer: index of the right option.
    """

    context: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    answer: int

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """The token that each option begins with."""
        return tuple(completion[0] for completion in self.completions)

    @property
    def first_tokens_differ(self) -> bool:
        """Whether the first token alone tells the options apart."""
        return len(set(self.first_tokens)) == len(self.completions)


def read_questions(path: str | Path, answer_as: str = "letter") -> list[Question]:
    """The questions of a JSON Lines file, all checked.

    Args:
        path: the file; empty lines are passed over.
        answer_as: "letter" or "text", how a model is to answer them.

    Raises:
        InputError: the file cannot be read, has no questions, or a line is no question; names file and line.
    """
    path = Path(path)
    if answer_as not in ANSWER_AS:
        raise InputError(f"answer_as is {answer_as!r}; it must be {' or '.join(ANSWER_AS)}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start + 1})") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    questions = [_question(line, f"{path}, line {number}", answer_as) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise InputError(f"{path} has no questions: one JSON object with `question`, `options` and `answer` on each line")
    return questions


def _question(line: str, place: str, answer_as: str) -> Question:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not an object")
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: text that is not sound Unicode (half of a surrogate pair)") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not a JSON object ({error})") from None
    missing = [name for name in ("question", "options", "answer") if name not in record]
    if missing:
        raise InputError(f"{place}: there is no `{missing[0]}`")
    text, options = record["question"], record["options"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: `question` is not a text")
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise InputError(f"{place}: `options` is not a list of texts")
    if len(options) < 2:
        raise InputError(f"{place}: a question needs at least two options, and this one has {len(options)}")
    repeated = [option for index, option in enumerate(options) if option.strip() in map(str.strip, options[:index])]
    if repeated:
        raise InputError(f"{place}: the option {repeated[0]!r} stands there twice")
    if answer_as == "letter" and len(options) > len(LETTERS):
        raise InputError(f"{place}: {len(options)} options are more than there are letters: use --answer-as text")
    return Question(text, tuple(options), _answer(record["answer"], options, place), place)


def _answer(answer: Any, options: Sequence[str], place: str) -> int:
    """The index that an answer stands for."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(options):
            raise InputError(f"{place}: the answer {answer} is no index of {len(options)} options (counted from 0)")
        return answer
    if not isinstance(answer, str):
        raise InputError(f"{place}: `answer` is neither an index, nor a letter, nor an option")
    meant = {options.index(answer)} if answer in options else set()
    if len(answer) == 1 and answer in LETTERS[: len(options)]:
        meant.add(LETTERS.index(answer))
    if not meant:
        raise InputError(f"{place}: the answer {answer!r} is neither an option nor a letter of one")
    if len(meant) > 1:
        raise InputError(f"{place}: the answer {answer!r} is an option and the letter of another: give its index")
    return meant.pop()


def prompt(question: Question, answer_as: str = "letter") -> str:
    """The question as text, up to and with `Answer:`; its options are listed where a letter is the answer."""
    listed = zip(LETTERS, question.options, strict=False) if answer_as == "letter" else ()
    return "\n".join([f"Question: {question.text}", *(f"{letter}. {option}" for letter, option in listed), "Answer:"])


def completions(question: Question, answer_as: str = "letter") -> list[str]:
    """What follows the prompt, for each option: " A" or " {option}"."""
    texts = question.options if answer_as == "text" else LETTERS[: len(question.options)]
    return [f" {text}" for text in texts]


def corpus_row(question: Question, answer_as: str = "letter") -> dict[str, str]:
    """The question with its right answer as a row of a corpus: `prompt` and `completion`."""
    return {"prompt": prompt(question, answer_as), "completion": completions(question, answer_as)[question.answer]}


def tokenise(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    answer_as: str = "letter",
    max_tokens: int | None = None,
) -> list[TokenisedQuestion]:
    """Questions as token ids, as a dump of their `corpus_row` has them.

    Where a token reaches over the end of the prompt, it belongs to the completions.

    Args:
        questions: as `read_questions` gives them.
        tokenizer: the model's.
        answer_as: "letter" or "text".
        max_tokens: how many tokens the model can take; None for no limit.

    Raises:
        InputError: a question with its longest option has more tokens than that, or the tokenizer makes nothing of an
            option; names the question's place.
    """
    opening = opening_tokens(tokenizer)

    def encode(text: str) -> list[int]:
        # The tokenizer warns of texts longer than its model's context; that is checked here.
        return [*opening, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    tokenised = []
    for question in questions:
        asked = prompt(question, answer_as)
        answered = [encode(asked + completion) for completion in completions(question, answer_as)]
        # All that letters can share is the space before them. Words that all options begin with are part of the answer.
        compared = answered if answer_as == "letter" else [encode(asked), *answered]
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*compared, strict=False)))
        ends = tuple(tuple(ids[shared:]) for ids in answered)
        if not shared or not all(ends):
            raise InputError(f"{question.place}: the tokenizer does not tell the question from its answers")
        if len(set(ends)) < len(ends):
            raise InputError(f"{question.place}: two options are the same tokens")
        size = shared + max(map(len, ends))
        if max_tokens is not None and size > max_tokens:
            raise InputError(f"{question.place}: the question has {size:,} tokens, and the model takes at most {max_tokens:,}")
        tokenised.append(TokenisedQuestion(tuple(answered[0][:shared]), ends, question.answer))
    return tokenised
