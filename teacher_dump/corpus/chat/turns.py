"""Where an assistant's turn begins and ends in a rendered conversation.

A turn is the words between its first mark and its last; before them, what follows the prompt that asks for an answer, which is
the syntax of a call or the marks of reasoning; after them, what stands there too when the conversation ends with the turn or
goes on in another way: the syntax that closes a call, and the end-of-turn token. Where no special token is among these, the
one that follows directly ends the turn: some templates end a turn by the header of the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from teacher_dump.corpus.chat.fields import CONTENT, TOOLS, Field
from teacher_dump.corpus.chat.marks import Marked
from teacher_dump.corpus.chat.messages import Form
from teacher_dump.corpus.chat.shapes import ASSISTANT, USER, ChatRow, Shapes
from teacher_dump.corpus.chat.words import Rendered
from teacher_dump.corpus.rows import BadRow


@dataclass(frozen=True)
class Text:
    """A rendered conversation and the tokens it is cut into.

    Attributes:
        text: the rendering.
        token_ids: int64 (L,).
        begins, ends: int64 (L,), the characters that each token stands for.
        special: bool (L,), which tokens are special ones.
    """

    text: str
    token_ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    special: np.ndarray

    @classmethod
    def of(cls, text: str, ids: list[int], offsets: list[tuple[int, int]], special: frozenset[int]) -> Text:
        """From what a tokenizer says of a text, and which of its tokens are special."""
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        # Some tokenizers leave white space out of their offsets. A token of nothing else begins where the one before it ended.
        begins = np.where(begins < ends, begins, np.minimum(begins, np.concatenate([[0], ends[:-1]])))
        return cls(text, np.array(ids, np.int64), begins, ends, np.array([token in special for token in ids], bool))


@dataclass(frozen=True)
class Run:
    """Marks of one message with none of another between them, as indices in `Marked.marks`: the first and the last."""

    first: int
    last: int


@dataclass(frozen=True)
class Around:
    """What stands around the words of a run.

    Attributes:
        places: where the mark before it, its own last, and the mark after it stand.
        before, following: the text between the outer marks and the inner ones.
        previous: the field that the mark before it belongs to; None where there is none.
        last: the field that its last mark belongs to.
    """

    places: tuple[int, int, int]
    before: str
    following: str
    previous: Field | None
    last: Field

    @classmethod
    def of(cls, marked: Marked, run: Run) -> Around:
        """Of a run of a rendering."""
        marks = marked.marks
        before = marks[run.first - 1].position if run.first else 0
        words, end, after = marks[run.first].position, marks[run.last].position, marked.next_mark(run.last)
        previous = marks[run.first - 1].field if run.first else None
        places = (before, end, after)
        return cls(places, marked.text[before:words], marked.text[end:after], previous, marks[run.last].field)


class Turns:
    """Finds the targets of assistant messages.

    Args:
        shapes: of the template's outlines.
        named: ids of the tokens that a tokenizer has beside those of its model, such as control tokens.

    Attributes:
        notes: what was found of the ends of turns that a person should know, a sentence for each kind.
    """

    def __init__(self, shapes: Shapes, named: frozenset[int]):
        self._shapes = shapes
        self._named = np.array(sorted(named), np.int64)
        self.notes: dict[str, str] = {}

    def of(self, rendered: Rendered, text: Text, index: int, closed: bool = True) -> np.ndarray:
        """Which tokens are the turn of one assistant message, bool (L,).

        Args:
            rendered: the conversation.
            text: its tokens.
            index: of the message.
            closed: whether what closes it is of the turn.

        Raises:
            BadRow: a token holds text of another message too, or nobody can tell where a turn begins or ends.
        """
        targets = np.zeros(len(text.token_ids), bool)
        marked = rendered.marked
        runs = _runs(marked, index)
        if not runs and index not in rendered.dropped_reasoning:
            raise BadRow(f"an answer has no words beside marks of reasoning: message {index + 1}; remove it")
        if runs:
            self._check_results(rendered, runs, index)
        for number, run in enumerate(runs):
            around = Around.of(marked, run)
            before, end, after = around.places
            header, closing = self._sizes(rendered, index, number, around)
            begin = before + header
            inner = (text.begins < end) & (text.ends > begin)
            if (inner & ((text.begins < before) | (text.ends > after))).any():
                raise BadRow(
                    "a token holds words of the assistant and of another message, so that it is neither target nor context:"
                    f" message {index + 1}; name another template with --chat-template"
                )
            self._check_border(rendered, text, index, end, closing)
            if not closed and number + 1 == len(runs):
                targets |= inner
                continue
            closing_tokens = self._closing(rendered, text, end, closing, self._next_turn(rendered, run))
            if number + 1 == len(runs):
                self._note_end(rendered, text, index, end, closing_tokens)
            targets |= inner | closing_tokens
        return targets

    def _next_turn(self, rendered: Rendered, run: Run) -> int:
        """Where the next message begins if it is the assistant's and follows a run directly; the text's end otherwise."""
        marked, place = rendered.marked, run.last + 1
        if place < len(marked.marks):
            index = marked.marks[place].field.message
            runs = _runs(marked, index) if index != TOOLS and rendered.row.messages[index].role == "assistant" else []
            for number, further in enumerate(runs):
                if further.first == place:
                    around = Around.of(marked, further)
                    return around.places[0] + self._sizes(rendered, index, number, around)[0]
        return len(marked.text)

    def _check_border(self, rendered: Rendered, text: Text, index: int, end: int, size: int) -> None:
        """Make sure that no token stands half in a turn and half in the template's text after it."""
        stop = end + size
        visible, past = end + len(text.text[end:stop].rstrip()), _past_space(text.text, stop)
        split = ~np.isin(text.token_ids, self._named) & (text.begins < max(visible, end)) & (text.ends > past)
        if split.any() and self._prompt(rendered.outline, rendered.form):
            written = text.text[end:visible].strip()
            ending = f"the template ends a turn with {written}, which is no token of the tokenizer" if written else ""
            raise BadRow(
                "a token holds the end of an answer and text that follows it, so that it is neither target nor context:"
                f" message {index + 1}; {ending or 'the template writes no end of turn'}: name another one with"
                " --chat-template"
            )

    def _note_end(self, rendered: Rendered, text: Text, index: int, end: int, closing: np.ndarray) -> None:
        """Note it where a turn ends without a token that says so; before a result or more of the assistant it need not."""
        messages = rendered.row.messages
        if index + 1 < len(messages) and messages[index + 1].role in ("assistant", "tool"):
            return
        if np.isin(text.token_ids[closing], self._named).any():
            return
        written = text.text[end : int(text.ends[closing].max())].strip() if closing.any() else ""
        if written:
            self.notes.setdefault(
                "pieces",
                f"the chat template ends a turn with {written}, which is no token of the tokenizer: a student learns to stop by"
                " its pieces, or from a template of --chat-template that ends turns with a token",
            )
        else:
            self.notes.setdefault(
                "nothing",
                "the chat template writes nothing at the end of an answer, or nothing after the last one, so that a student"
                " does not learn there to stop: name a template that ends turns with --chat-template",
            )

    def _sizes(self, rendered: Rendered, index: int, number: int, around: Around) -> tuple[int, int]:
        """How many characters before the words of a run are the template's, and how many after them close the turn."""
        form = rendered.form
        excerpt, place = rendered.outline.excerpt(index)
        for row, at in ((excerpt, place), (rendered.outline, index), (rendered.row, index)):
            marked = self._shapes.marked(row, form)
            runs = _runs(marked, at) if marked is not None else []
            if marked is None or number >= len(runs):
                continue
            surroundings = Around.of(marked, runs[number])
            if surroundings.before == around.before and surroundings.following == around.following:
                header = len(surroundings.before) if number else self._header(row, form, at, surroundings)
                return header, self._closing_size(row, form, at, surroundings)
        raise BadRow(
            "the chat template writes this conversation in a way of its own, so that the assistant's turns cannot be told from"
            f" the rest: message {index + 1}; name another template with --chat-template"
        )

    def _check_results(self, rendered: Rendered, runs: list[Run], index: int) -> None:
        """Make sure that no result of a call stands within a run, unseen because it is empty."""
        silent = [n for n, message in enumerate(rendered.row.messages) if message.role == "tool" and not message.has_words]
        if not silent:
            return
        outline, place = replace(
            rendered.outline,
            messages=[
                replace(message, content=("word",)) if number in silent else message
                for number, message in enumerate(rendered.outline.messages)
            ],
        ).excerpt(index)
        speaking = self._shapes.marked(outline, rendered.form)
        if speaking is None or len(_runs(speaking, place)) != len(runs):
            raise BadRow(
                "the result of a call is empty, and the chat template puts it into the assistant's turn, where nobody can tell"
                f" it from the answer: message {index + 1}; give the result words"
            )

    def _header(self, row: ChatRow, form: Form, index: int, around: Around) -> int:
        """How many characters between a turn's words and the words before them are the template's, and not the assistant's."""
        before, asked = around.before, None
        if index and around.previous is not None:
            prompt = self._after(row.first(index), form, around.previous, prompt=True)
            silence = self._after(row.first(index), form, around.previous)
            if prompt is not None and silence is not None and _shared(before, prompt) > _shared(prompt, silence):
                return _shared(before, prompt)
            asked = None if prompt is None else _shared(before, prompt)
        header = self._prompt(row, form)
        if header and (place := before.rfind(header)) >= 0:
            return place + len(header)
        answer = Field(index, "content", CONTENT)
        plain = self._shapes.marked(row.first(index, ASSISTANT), form)
        if plain is not None and answer in plain.places:
            first = plain.places[answer][0]
            start = plain.marks[first - 1].position if first else 0
            size = _shared(before, plain.text[start : plain.marks[first].position])
            # A template that asks with nothing ("[/INST]") leaves the blank before the first word to the assistant.
            return asked if asked is not None and not before[asked:size].strip() else size
        return len(before)

    def _closing_size(self, row: ChatRow, form: Form, index: int, around: Around) -> int:
        """How many characters after a turn's words stand there too where the conversation ends with it, or goes on if it ends
        there itself."""
        last = index + 1 == len(row.messages)
        other = self._after(row.first(index + 1, *([USER] if last else [])), form, around.last)
        if other is None:
            return len(around.following) if last else 0
        size = _shared(around.following, other)
        begun = around.following[:size].rstrip() if size < min(len(around.following), len(other)) else ""
        words = begun.rsplit(None, 1)
        # What follows may begin alike either way: half a tag of the next header closes nothing.
        return len(begun) - len(words[1]) if len(words) > 1 and len(begun) == size else size

    def _closing(self, rendered: Rendered, text: Text, end: int, size: int, next_turn: int) -> np.ndarray:
        """Which tokens close a turn whose words end at a place, bool (L,).

        Args:
            rendered, text: the conversation.
            end: of its words.
            size: of what closes it, in characters.
            next_turn: where the next message of the assistant begins: what stands there closes nothing.
        """
        stop = end + size
        visible = end + len(text.text[end:stop].rstrip())
        before = (text.begins >= end) & (text.begins < next_turn)
        closing = before & (text.begins < visible) & (text.ends <= _past_space(text.text, stop))
        if closing.any():  # what follows may begin alike: white space before half a token is the template's
            closing &= text.begins < end + len(text.text[end : int(text.ends[closing].max())].rstrip())
        prompt = self._prompt(rendered.outline, rendered.form)
        if not prompt:  # the template asks for an answer at every end, or never: what stands there is no witness
            ends = np.flatnonzero(closing & text.special)
            closing[ends[0] + 1 if len(ends) else len(closing) :] = False
        if not (closing & text.special).any():
            begin = _past_space(text.text, int(text.ends[closing].max()) if closing.any() else end)
            direct = text.special & before & (text.begins <= begin) & (text.ends > begin)
            # The header of another turn of the assistant does not end this one.
            if direct.any() and not prompt.lstrip().startswith(text.text[begin : text.ends[direct].max()]):
                closing |= direct
        return closing

    def _prompt(self, row: ChatRow, form: Form) -> str:
        """What asks for an answer to a question; empty where nothing does."""
        asked = self._shapes.marked(row.first(0, USER), form, prompt=True)
        ended = self._shapes.marked(row.first(0, USER), form)
        return "" if asked is None or ended is None else asked.text[_shared(asked.text, ended.text) :]

    def _after(self, row: ChatRow, form: Form, field: Field, prompt: bool = False) -> str | None:
        marked = self._shapes.marked(row, form, prompt)
        return None if marked is None else marked.after(field)


def _runs(marked: Marked, index: int) -> list[Run]:
    """The runs of a message's fields, each field where it stands first."""
    places = sorted(place for field, place in marked.places.items() if field.message == index)
    runs: list[Run] = []
    for first, last in places:
        if runs and all(mark.field.message == index for mark in marked.marks[runs[-1].last : first]):
            runs[-1] = Run(runs[-1].first, max(last, runs[-1].last))
        else:
            runs.append(Run(first, last))
    return runs


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(place for place in range(length) if one[place] != other[place])


def _past_space(text: str, place: int) -> int:
    return len(text) - len(text[place:].lstrip())
