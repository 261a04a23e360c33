"""A chat template on conversations: text with all its words, its tokens, and the targets among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_store.errors import InputError
from teacher_dump.corpus.chat.fields import think_tags
from teacher_dump.corpus.chat.messages import Form, Message, forms, messages_of
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.chat.refusals import Refusals
from teacher_dump.corpus.chat.rendering import Renderer, TemplateRefusal, check_arguments
from teacher_dump.corpus.chat.shapes import ChatRow, Shapes
from teacher_dump.corpus.chat.turns import Text, Turns
from teacher_dump.corpus.chat.words import LostWords, Rendered, Words
from teacher_dump.corpus.messages import OTHER_NAMES
from teacher_dump.corpus.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conversation:
    """What a chat template makes of a conversation.

    Attributes:
        token_ids: int64 (L,).
        is_target: bool (L,), what the assistant writes: content, reasoning, calls, and the token that ends its turn.
        dropped_reasoning: how many messages' reasoning the template left out, as it does in turns before the last.
    """

    token_ids: np.ndarray
    is_target: np.ndarray
    dropped_reasoning: int


class ChatTemplate:
    """A tokenizer's chat template at work on conversations.

    Args:
        tokenizer: of the teacher.
        options: what a manifest says of conversations.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions):
        self._tokenizer, self._options = tokenizer, options
        self._renderer = Renderer(tokenizer, options)
        shapes = Shapes(self._renderer)
        self._words = Words(self._renderer, shapes)
        self._special = _special_tokens(tokenizer)
        self._refusals = Refusals(self._renderer)
        self._turns = Turns(shapes, self._special | tokenizer.added_tokens_decoder.keys())

    @property
    def notes(self) -> list[str]:
        """What a person should know of the ends of the turns so far."""
        return list(self._turns.notes.values())

    def prompt(self, records: list[dict[str, Any]], arguments: dict[str, Any] | None = None) -> str:
        """Messages as text, behind which the assistant is asked for an answer.

        Args:
            records: the messages. arguments: as of `tokens`.

        Raises:
            BadRow: they cannot be used, or some of their words would be lost; names message and field.
            InputError: there is no template.
        """
        row = self._row(messages_of(records), arguments)
        form = self._rendered(row).form
        return self._renderer.render(row.messages, form, row.tools, row.arguments, prompt=True)

    def _row(self, messages: list[Message], arguments: dict[str, Any] | None) -> ChatRow:
        """What a row gives its template (BadRow: it gives too much; InputError: there is no template)."""
        arguments = dict(arguments or {})
        tools = arguments.pop("tools", None) or None
        check_arguments(arguments)
        template = self._renderer.template(tools)
        return ChatRow(messages, tools, arguments, template, think_tags(template))

    def tokens(
        self,
        records: list[dict[str, Any]],
        arguments: dict[str, Any] | None = None,
        completion_from: int = 0,
        cut_off: bool = False,
    ) -> Conversation:
        """A conversation's tokens and targets.

        Args:
            records: its messages, as the row has them.
            arguments: `chat_template_kwargs`, and `tools` among them.
            completion_from: index of the first message that may be a target.
            cut_off: whether the last of the assistant goes on: what closes its turn is no target.

        Raises:
            BadRow: it cannot be used, or some of its words would be lost; names message and field.
            InputError: the tokenizer cannot be used for conversations.
        """
        if not self._tokenizer.is_fast:
            raise InputError(
                "the corpus has conversations, and the teacher's tokenizer (a slow one) cannot tell where in a text its tokens"
                " stand: give rows with `prompt` and `completion` as strings"
            )
        messages = messages_of(records)
        row = self._row(messages, arguments)
        targets = self._targets(messages, completion_from)
        rendered = self._rendered(row)
        rendering = rendered.marked.text
        encoded = self._tokenizer(rendering, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        text = Text.of(rendering, encoded["input_ids"], encoded["offset_mapping"], self._special)
        is_target = np.zeros(len(text.token_ids), bool)
        last = max(index for index, message in enumerate(messages) if message.role == "assistant")
        for index in targets:
            turn = self._turns.of(rendered, text, index, closed=not cut_off or index != last)
            if (is_target & turn).any():
                raise BadRow(
                    "the chat template writes two answers into one another, so that nobody can tell which tokens are whose:"
                    f" message {index + 1}; name another template with --chat-template"
                )
            is_target |= turn
        if not is_target.any():
            raise BadRow("the chat template leaves nothing of the assistant's messages, so nothing is there to learn")
        return Conversation(text.token_ids, is_target, len(rendered.dropped_reasoning))

    def _targets(self, messages: list[Message], completion_from: int) -> list[int]:
        """Indices of the messages to learn."""
        for index, message in enumerate(messages[completion_from:], completion_from):
            named = message.role != "assistant" and message.role.strip().lower() in OTHER_NAMES
            if named and message.target is not False:
                raise BadRow(
                    "a message has another name of the assistant as its role, so that its words would be context: message"
                    f" {index + 1} ({message.role}); give it the role `assistant`, or `weight` 0 where it is context"
                )
        assistants = [
            index for index, message in enumerate(messages) if message.role == "assistant" and index >= completion_from
        ]
        if not assistants:
            raise BadRow("no message has the role `assistant`, so nothing is there to learn")
        if self._options.train_on == "last":
            assistants = assistants[-1:]
        targets = [index for index in assistants if messages[index].target is not False]
        if not targets:
            raise BadRow("`weight` or `train` leaves no message of the assistant to learn")
        for index in targets:
            if not messages[index].has_words:
                raise BadRow(
                    f"an answer is empty, so only the end of its turn is there to learn: message {index + 1} (assistant)"
                )
        return targets

    def _rendered(self, row: ChatRow) -> Rendered:
        """The row in the first form in which the template shows all its words; or why there is none, as the form has it that
        comes nearest."""
        problems: list[tuple[int, BadRow]] = []
        refused: list[tuple[Form, TemplateRefusal]] = []
        for form in forms(row.messages):
            try:
                return self._words.rendered(row, form)
            except LostWords as lost:
                problems.append((len(lost.fields), lost))
            except TemplateRefusal as refusal:
                refused.append((form, refusal))
            except BadRow as refusal:
                problems.append((int(form.parts), refusal))
        if problems:
            raise min(problems, key=lambda problem: problem[0])[1]
        raise self._refusals.explained(row, refused)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the special tokens, also of those that have no name of their own."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return frozenset({*added, *tokenizer.all_special_ids})
