"""Documents to sequences of token ids, shaped as TRL's SFTTrainer shapes them (rows, targets, end of sequence).

* `text`: every token counts; an end-of-sequence token closes the text; a long text becomes consecutive windows, each opened
  by the tokens that the tokenizer puts before a text (a beginning-of-sequence token, where it has one).
* `prompt` + `completion`: the completion's tokens count, from where prompt and prompt + completion differ as token ids.
* `messages`: the assistant's tokens count, as the chat template marks them with {% generation %}. For a template without those
  marks, an assistant turn is what the template adds to the prompt that would ask for it, and the row is refused where rendering
  a conversation turn by turn does not give the conversation.

What is longer than `max_length` and no plain text is cut at its end, as TRL does, and its sequence says `truncated`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from knowledge_store.errors import InputError
from teacher_dump.corpus.documents import Document, Turns

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class BadRow(Exception):
    """A row of the corpus cannot be used; the message says why."""


@dataclass(frozen=True)
class TokenSequence:
    """What the teacher sees at once.

    Attributes:
        document: where it comes from; window: its place among the document's sequences.
        token_ids: int64 (L,), L at least 2.
        is_target: bool (L,); never true at position 0, which nothing predicts.
        truncated: whether the document went on after max_length.
    """

    document: Document
    window: int
    token_ids: np.ndarray
    is_target: np.ndarray
    truncated: bool


class CorpusTokenizer:
    """Turns documents into sequences of at most `max_length` tokens.

    Raises (on construction):
        InputError: max_length leaves no room for text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._opening = _opening_tokens(tokenizer)
        if max_length < len(self._opening) + 2:
            raise InputError(f"--max-length {max_length} leaves no room: give at least {len(self._opening) + 2}")

    def sequences(self, document: Document) -> list[TokenSequence]:
        """The sequences of a document; none when it is empty.

        Raises:
            BadRow: the document cannot be used; says why.
        """
        if document.problem is not None:
            raise BadRow(document.problem)
        if document.text is not None:
            return self._windows(document, document.text)
        if document.messages is not None:
            token_ids, is_target = self._conversation(document.messages, document.template_arguments or {})
        else:
            token_ids, is_target = self._completion(document)
        first = int(np.argmax(is_target)) if is_target.any() else len(token_ids)
        if first >= self.max_length:
            raise BadRow(f"the prompt has {first} tokens, and --max-length {self.max_length} leaves nothing of what follows it")
        sequence = self._sequence(document, 0, token_ids, is_target, len(token_ids) > self.max_length)
        return [sequence] if sequence.is_target.any() else []

    def _sequence(
        self, document: Document, window: int, token_ids: np.ndarray, is_target: np.ndarray, truncated: bool
    ) -> TokenSequence:
        is_target = is_target[: self.max_length].copy()
        is_target[:1] = False
        return TokenSequence(document, window, token_ids[: self.max_length], is_target, truncated)

    def _encode(self, text: str) -> list[int]:
        # The tokenizer warns of texts longer than its model's context; windows take care of that.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _close(self, token_ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return token_ids if end is None or token_ids[-1:] == [end] else [*token_ids, end]

    def _windows(self, document: Document, text: str) -> list[TokenSequence]:
        if not text:
            return []
        token_ids = self._encode(text)
        if document.last_part:
            token_ids = self._close(token_ids)
        room = self.max_length - len(self._opening)
        starts = list(range(0, len(token_ids), room))
        if len(self._opening) + len(token_ids) - starts[-1] < 2 < room and len(starts) > 1:
            starts[-1] -= 1  # one token alone has nothing to be predicted from: it takes the one before it along
        ends = [*starts[1:], len(token_ids)]
        windows = [[*self._opening, *token_ids[start:end]] for start, end in zip(starts, ends, strict=True)]
        return [
            self._sequence(document, window, np.array(ids, np.int64), np.ones(len(ids), bool), False)
            for window, ids in enumerate(windows)
            if len(ids) > 1
        ]

    def _completion(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        prompt, completion = document.prompt, document.completion
        if isinstance(prompt, str) and isinstance(completion, str):
            prompt_ids = [*self._opening, *self._encode(prompt)]
            token_ids = self._close([*self._opening, *self._encode(prompt + completion)])
        else:
            assert isinstance(prompt, list) and isinstance(completion, list)
            arguments = document.template_arguments or {}
            prompt_ids = self._encode(self._render(prompt, arguments, add_generation_prompt=True))
            token_ids = self._encode(self._render([*prompt, *completion], arguments))
        length = min(len(prompt_ids), len(token_ids))
        differing = np.array(prompt_ids[:length]) != np.array(token_ids[:length])
        prompt_length = int(np.argmax(differing)) if differing.any() else length
        return np.array(token_ids, np.int64), np.arange(len(token_ids)) >= prompt_length

    def _render(self, turns: Turns, arguments: dict[str, Any], add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise InputError(
                "the corpus has conversations, and the teacher's tokenizer has no chat template:"
                " give rows with `text`, or `prompt` and `completion` as strings"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
                )
            )
        except Exception as error:  # a template is a program of its own, and a row can make it fail in any way
            raise BadRow(f"the chat template refuses it: {str(error).splitlines()[0] if str(error) else error!r}") from None

    def _conversation(self, turns: Turns, arguments: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if not any(turn["role"] == "assistant" for turn in turns):
            raise BadRow("no message has the role `assistant`, so nothing is there to learn")
        if not self.tokenizer.is_fast:
            raise InputError(
                "the corpus has `messages`, and the teacher's tokenizer (a slow one) cannot tell which of its tokens are the"
                " assistant's: give rows with `prompt` and `completion`"
            )
        whole = self._render(turns, arguments)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        # Some tokenizers leave white space out of their offsets, and transformers then loses what the marks say.
        sound_offsets = bool((begins < ends).all())
        if sound_offsets and _GENERATION_MARK.search(self.tokenizer.get_chat_template(tools=arguments.get("tools"))):
            marked = self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
            )
            token_ids, is_target = np.array(marked["input_ids"], np.int64), np.array(marked["assistant_masks"], bool)
        else:
            # A token of white space that was left out begins where the one before it ended.
            begins = np.where(begins < ends, begins, np.minimum(begins, np.concatenate([[0], ends[:-1]])))
            token_ids, is_target = np.array(encoded["input_ids"], np.int64), np.zeros(len(begins), bool)
            for start, stop in self._assistant_spans(turns, arguments, whole):
                # A token that begins before the assistant's turn is not the assistant's to predict.
                is_target |= (begins >= start) & (ends <= stop)
        if not is_target.any():
            raise BadRow("the chat template leaves nothing of the assistant's messages, so nothing is there to learn")
        return token_ids, is_target

    def _assistant_spans(self, turns: Turns, arguments: dict[str, Any], whole: str) -> list[tuple[int, int]]:
        """Where in the rendered conversation the assistant's words are, its end-of-turn token included."""
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            asked = self._render(turns[:index], arguments, add_generation_prompt=True)
            answered = self._render(turns[: index + 1], arguments)
            if not answered.startswith(asked) or not whole.startswith(answered):
                raise BadRow(
                    "the chat template does not mark the assistant's tokens with {% generation %} (or the tokenizer cannot"
                    f" place them), and renders this conversation differently turn by turn (message {index + 1})"
                )
            # White space after the end-of-turn token is the template's, not the assistant's.
            spans.append((len(asked), len(answered.rstrip())))
        return spans


def _opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before a text of its own accord."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return []
