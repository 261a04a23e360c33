"""A chat template at work: messages to text, on a fixed date."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowledge_store.errors import InputError
from teacher_dump.corpus.chat.messages import Form, Message
from teacher_dump.corpus.chat.options import ChatOptions
from teacher_dump.corpus.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A template gets the date from the clock of its machine by calling `strftime_now`. transformers lets a caller pass data alone,
# so a macro of that name, put before the template, reads the date from a table of what each directive gives. The line break
# after the macro is its end tag's, and the template begins as if at the beginning of a file.
_DATES = "template_date"
_CLOCK = (
    "{%- macro strftime_now(format) -%}"
    "{%- set date = namespace(text=format | replace('%%', '\\uf8ff')) -%}"
    "{%- for directive, value in " + _DATES + " | items -%}"
    "{%- set date.text = date.text | replace(directive, value) -%}"
    "{%- endfor -%}"
    "{{- date.text | replace('\\uf8ff', '%') -}}"
    "{%- endmacro %}\n"
)

# Arguments of `apply_chat_template` that decide what comes back, and are no template's own.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
        _DATES,
    }
)


class TemplateRefusal(BadRow):
    """A chat template fails on a row.

    Attributes:
        error: what it says, in one line.
    """

    def __init__(self, error: str):
        self.error = error
        super().__init__(f"the chat template refuses it: {error}")


class Renderer:
    """A tokenizer's chat templates, or the one that stands in for them.

    Args:
        tokenizer: of the teacher.
        options: which template, and the date.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions):
        self._tokenizer, self._options = tokenizer, options
        self._texts: dict[str, str] = {}

    def asks_for_date(self) -> bool:
        """Whether a template may ask for today's date."""
        templates = self._options.template or self._tokenizer.chat_template or ""
        return any("strftime_now" in text for text in (templates.values() if isinstance(templates, dict) else [templates]))

    def template(self, tools: list[Any] | None) -> str:
        """The text of the template for rows with or without tools: a tokenizer may have several by name.

        Raises:
            InputError: there is none.
        """
        if self._options.template is not None:
            return self._options.template
        templates = self._tokenizer.chat_template
        if not templates:
            raise InputError(
                "the corpus has conversations, and the teacher's tokenizer has no chat template: name one with --chat-template,"
                " or give rows with `text`, or `prompt` and `completion` as strings"
            )
        if isinstance(templates, str):
            return templates
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError:
            raise InputError(
                f"the teacher's tokenizer has the chat templates {', '.join(templates)}, and none is the `default`: choose one"
                " with --chat-template"
            ) from None

    def render(
        self,
        messages: list[Message],
        form: Form,
        tools: list[Any] | None,
        arguments: dict[str, Any],
        prompt: bool = False,
    ) -> str:
        """A conversation as text.

        Args:
            messages: at least one.
            form: that they are given in.
            tools, arguments: of the row.
            prompt: whether the assistant is asked for an answer at the end.

        Raises:
            TemplateRefusal: the template fails.
            InputError: there is no template.
        """
        from jinja2.exceptions import TemplateSyntaxError  # transformers needs it for chat templates alone

        template = self.template(tools)
        if "strftime_now" in template:
            arguments = {**arguments, _DATES: self._options.clock()}
            template = self._texts.setdefault(template, _CLOCK + template)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [message.record(form) for message in messages],
                    tools=tools,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **arguments,
                )
            )
        except TemplateSyntaxError as error:
            raise InputError(
                f"the chat template is not Jinja: line {error.lineno}: {error.message}; name another with --chat-template"
            ) from None
        except Exception as error:  # a template is a program of its own, and a row can make it fail in any way
            raise TemplateRefusal(str(error).splitlines()[0] if str(error) else repr(error)) from None


def check_arguments(arguments: dict[str, Any]) -> None:
    """Make sure that a row's `chat_template_kwargs` are a template's.

    Raises:
        BadRow: one is none; names it.
    """
    taken = sorted(_RESERVED & arguments.keys())
    if taken:
        raise BadRow(f"`chat_template_kwargs` has `{taken[0]}`, which is no argument of a chat template: remove it")
