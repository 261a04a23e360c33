"""No word of a row is lost: a rendering with marks shows every field, or the row is refused with the field's name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from teacher_dump.corpus.chat.fields import CONTENT, IDENTIFIERS, NAME, REASONING, TEXT, TOOLS, Field, closing_tag_among_words
from teacher_dump.corpus.chat.marks import Marked, Marks
from teacher_dump.corpus.chat.messages import Form
from teacher_dump.corpus.chat.rendering import Renderer
from teacher_dump.corpus.chat.shapes import USER, ChatRow, Shapes
from teacher_dump.corpus.rows import BadRow


class LostWords(BadRow):
    """A template leaves out words of a row.

    Attributes:
        fields: that are lost.
    """

    def __init__(self, row: ChatRow, fields: list[Field]):
        self.fields = fields
        place = fields[0]
        if place.message == TOOLS:
            which, remedy = f"`{place.name}`", "remove it"
        else:
            role = row.messages[place.message].role
            which = f"message {place.message + 1} ({role}), `{place.name}`"
            if place.kind == REASONING and place.name != "reasoning_content":
                which += " (its reasoning)"
            remedy = "give the message the role `system`" if role == "developer" else "remove it"
            tag = closing_tag_among_words(row.messages[place.message], row.tags)
            if tag is not None and place.name.startswith("content"):
                remedy = f"give what stands before {tag[1]} as `reasoning_content` if it is reasoning, or remove the tag"
        super().__init__(
            f"the chat template leaves out words of the row: {which}; name a template that shows them with --chat-template, or"
            f" {remedy}"
        )


@dataclass(frozen=True)
class Rendered:
    """A row's text with all its words.

    Attributes:
        row, form: what was rendered.
        outline: of the row; its identifiers stay where the text shows them.
        marked: the rendering.
        dropped_reasoning: indices of messages whose reasoning is left out because others follow.
    """

    row: ChatRow
    form: Form
    outline: ChatRow
    marked: Marked
    dropped_reasoning: frozenset[int]


class Words:
    """Renders rows and makes sure that their words are there.

    Args:
        renderer: of the template.
        shapes: of its outlines.
    """

    def __init__(self, renderer: Renderer, shapes: Shapes):
        self._renderer, self._shapes = renderer, shapes

    def rendered(self, row: ChatRow, form: Form) -> Rendered:
        """A row's text, and where the words of each field stand in it.

        Raises:
            LostWords: the template leaves some out.
            BadRow: it refuses the row, or looks into its words, so that nobody can tell where they stand.
        """
        plain = self._text(row, form)
        marks, marked = self._fitting(row, form, plain)
        lost = [*marked.cut, *(place for place in [*marked.missing, *marks.unmarked] if not self._seen(row, form, place))]
        dropped = {place for place in lost if place.kind == REASONING and self._drops(row, form, place)}
        lost = [place for place in lost if place not in dropped]
        lost += _miswritten(row, form, plain)
        if lost:
            raise LostWords(row, lost)
        self._check_thoughts(row, form, marked)
        self._check_values(row, form, marks.values)
        self._check_arguments(row, form, plain)
        outline = row.outline(form)
        identifiers = row.identifiers()
        if identifiers and not any(identifier in plain for identifier in identifiers):
            outline = outline.with_numbered_identifiers()
        return Rendered(row, form, outline, marked, frozenset(place.message for place in dropped))

    def _text(self, row: ChatRow, form: Form) -> str:
        return self._renderer.render(row.messages, form, row.tools, row.arguments)

    def _fitting(self, row: ChatRow, form: Form, plain: str) -> tuple[Marks, Marked]:
        """Marks that change nothing of the text, as many as there can be, and the rendering with them."""
        for marks in (Marks(), Marks(lambda place: place.message != TOOLS)):
            marked = self._with_marks(row, form, marks)
            if marked is not None and marked.text == plain:
                return marks, marked
        # The template looks into the words somewhere: find out where, one field at a time.
        around, inside = set(), set()
        for place in marks.fields:
            if self._fits(row, form, plain, {place}, set()):
                around.add(place)
            elif not _is_answer(row, place) and self._fits(row, form, plain, set(), {place}):
                inside.add(place)
            elif _is_answer(row, place) and place.kind != NAME:
                raise BadRow(
                    "the chat template looks into the words of the assistant, so that its turns cannot be told from the rest:"
                    f" message {place.message + 1}, `{place.name}`; name another template with --chat-template"
                )
        marks = Marks(around.__contains__, inside.__contains__)
        marked = self._with_marks(row, form, marks)
        if marked is None or marked.text != plain:
            raise BadRow(
                "the chat template looks into the words of several messages at once, so that the assistant's turns cannot be"
                " told from the rest; name another template with --chat-template"
            )
        return marks, marked

    def _fits(self, row: ChatRow, form: Form, plain: str, around: set[Field], inside: set[Field]) -> bool:
        marks = Marks(around.__contains__, inside.__contains__)
        marked = self._with_marks(row, form, marks)
        return marked is not None and marked.text == plain and not (marked.cut or marked.missing)

    def _with_marks(self, row: ChatRow, form: Form, marks: Marks) -> Marked | None:
        changed = row.changed(form, marks.change)
        try:
            return Marked(self._text(changed, form), marks)
        except BadRow:
            return None

    def _seen(self, row: ChatRow, form: Form, place: Field) -> bool:
        """Whether words without marks are in the text nevertheless: written in another way, such as a list of Python's."""
        if place.kind not in (TEXT, NAME):
            return False
        # Few messages are enough where the words are a tool's.
        return self._shapes.shows(row.outline(form).excerpt(0)[0] if place.message == TOOLS else row, form, place)

    def _drops(self, row: ChatRow, form: Form, place: Field) -> bool:
        """Whether a template that leaves reasoning out shows it as long as no further message follows."""
        if place.message + 1 == len(row.messages):
            return False
        outline = row.outline(form)
        excerpt, index = outline.excerpt(place.message)
        for shorter, at in ((excerpt, index), (outline, place.message)):
            cut = self._shapes.marked(shorter.first(at + 1), form)
            if cut is not None and place._replace(message=at) in cut.places:
                return True
        return False

    def _check_thoughts(self, row: ChatRow, form: Form, marked: Marked) -> None:
        """Make sure that no template opens a thought before words that are content."""
        for index, message in enumerate(row.messages):
            pair = closing_tag_among_words(message, row.tags)
            places = [first for place, (first, _) in marked.places.items() if place.message == index and place.kind == CONTENT]
            if pair is None or not places:
                continue
            first = min(places)
            before = marked.text[marked.marks[first - 1].position if first else 0 : marked.marks[first].position]
            asked = self._shapes.marked(row.first(0, USER), form, prompt=True)
            opened = asked is not None and asked.text.rstrip().endswith(pair[0])  # the assistant goes on within the thought
            if before.rstrip().endswith(pair[0]) and message.reasoning is None and not opened:
                raise BadRow(
                    f"the chat template takes what stands before {pair[1]} in the content for reasoning: message {index + 1}"
                    " (assistant), `content`; give it as `reasoning_content` if it is, or remove the tag"
                )

    def _check_values(self, row: ChatRow, form: Form, values: list[Field]) -> None:
        """Make sure that numbers and truth values of arguments and tools are in the text."""
        outline = row.outline(form, values=True) if values else row
        lost = []
        for place in values:
            excerpt, index = outline.excerpt(max(place.message, 0))  # of a tool's, few messages are enough
            if not self._shapes.shows(excerpt, form, place._replace(message=TOOLS if place.message == TOOLS else index)):
                lost.append(place)
        if lost:
            raise LostWords(row, lost)

    def _check_arguments(self, row: ChatRow, form: Form, plain: str) -> None:
        """Make sure that words among the template's further arguments are in the text: another word there makes another text.
        One word alone may be a switch, if the template's text has its name."""
        for name, value in row.arguments.items():
            if isinstance(value, str) and len(value.split()) < 2 and re.search(rf"\b{re.escape(name)}\b", row.template):
                continue
            for path, changed in _text_changes(value, name):
                try:
                    text = self._text(replace(row, arguments={**row.arguments, name: changed}), form)
                except BadRow:
                    continue
                if text == plain:
                    raise BadRow(
                        f"the chat template leaves out words of `chat_template_kwargs`: `{path}`; name a template that shows"
                        " them with --chat-template, or remove it"
                    )


def _text_changes(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A JSON value with one text after another changed, and the place of each."""
    if isinstance(value, str) and value.strip():
        yield path, f"{value}other"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            for place, changed in _text_changes(item, f"{path}[{index}]"):
                yield place, [*value[:index], changed, *value[index + 1 :]]
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in IDENTIFIERS:
                yield from ((place, {**value, key: changed}) for place, changed in _text_changes(item, f"{path}.{key}"))


def _is_answer(row: ChatRow, place: Field) -> bool:
    return place.message != TOOLS and row.messages[place.message].role == "assistant"


def _miswritten(row: ChatRow, form: Form, text: str) -> list[Field]:
    """Fields that stand in the text as Python prints an object or a list, or as JSON text within JSON text."""
    places = []
    for index, message in enumerate(row.messages):
        if form.parts and str(message.record(form).get("content")) in text:
            places.append(Field(index, "content", CONTENT))
        for number, call in enumerate(message.calls):
            written = str(call.arguments)
            if form.arguments_as_text:
                sound = call.text.strip() in text
            else:
                sound = written == json.dumps(call.arguments, ensure_ascii=False) or written not in text
            if not sound:
                places.append(Field(index, f"tool_calls[{number}].function.arguments", TEXT))
    return places
