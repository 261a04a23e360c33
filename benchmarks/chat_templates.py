"""Chat templates people use, each with conversations of many shapes: which are used, which are refused, and whether the targets
are right.

    python -m benchmarks.chat_templates [--share 0.1]

Templates: those of the package trl. Many have a variant that marks what the assistant writes with {% generation %}; where it
makes the same text, its marks are the judge of the targets, and words that stand nowhere else are the judge always. Figures go
to results/chat_templates.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measurement import keep
from teacher_dump.corpus.chat.options import ChatOptions, today
from teacher_dump.corpus.chat.template import ChatTemplate
from teacher_dump.corpus.rows import BadRow

# What is a token of its own under a template's tokenizer: special ones, and those that are not.
SPECIAL = re.compile(r"<\|[\w▁]+\|?>|<[\w▁]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|<image>")
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
BOS, EOS = "<bos>", "<eos>"

# Tokens that end a turn.
ENDS = re.compile(
    r"<\|(?:im_end|eot_id|eot|eom|end|return|call|END_OF_TURN_TOKEN|tool_response)\|?>|<end_of_turn>|<end_of_utterance>|<turn\|>"
    r"|<｜end▁of▁sentence｜>"
)
# Template text beside a turn in which marks may differ from ours: white space, marks of reasoning, the end of the sequence.
BESIDE = re.compile(r"(?:\s|</?think>|<eos>|<\|channel>thought\n|<channel\|>)*")
# Headers: of the assistant's turn, which some variants mark too, and of what a tool says, by which Gemma 4 ends a call.
HEADERS = re.compile(r"<\|start\|>(?:assistant)?|<｜Assistant｜>|<｜tool▁outputs▁end｜>|<\|tool_response>")

TEXT = "The keeper lit the lamp early, and asked how far it could be seen from the assistant's ship.\n\nIn winter they read. "


@dataclass(frozen=True)
class Shape:
    """What a conversation is made of.

    Attributes:
        turns: questions with their answers.
        opening: role of a first message: system, developer, or none.
        answers: what an answer holds.
        edge: whether it begins with the assistant or ends with the user.
    """

    turns: int
    opening: str
    answers: str
    edge: str

    def __str__(self) -> str:
        return ", ".join(word for word in (f"{self.turns} turns", self.opening, self.answers, self.edge) if word)


ANSWERS = (
    "plain", "reasoning", "reasoning in content", "parts", "calls", "calls with content", "two calls", "reasoning and calls",
    "arguments as text", "call at the end", "tools", "tools and calls",
)  # fmt: skip
SHAPES = [
    Shape(*words)
    for words in itertools.product((1, 2, 3), ("", "system", "developer"), ANSWERS, ("", "assistant first", "user last"))
    if not (words[1] == "developer" and (words[2] != "plain" or words[3]))
]


@dataclass
class Words:
    """Words that stand once in a conversation, by who says them."""

    assistant: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    reasoning: list[tuple[int, str]] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    count: int = 0

    def new(self, kind: str) -> str:
        """A word, noted under a kind."""
        letters = "".join("thekrlampsi"[int(digit)] for digit in f"{self.count:02d}")
        self.count += 1
        word = f"zq{letters}qz"
        getattr(self, kind).append(word)
        return word


def conversation(shape: Shape) -> tuple[list[dict[str, Any]], dict[str, Any], Words]:
    """A conversation of a shape, the template's further arguments, and its words."""
    words = Words()
    messages: list[dict[str, Any]] = []
    if shape.opening:
        messages.append({"role": shape.opening, "content": f"Be {words.new('others')} brief."})
    if shape.edge == "assistant first":
        messages.append({"role": "assistant", "content": f"Ask {words.new('assistant')}."})
        words.last.append(words.assistant[-1])
    for turn in range(shape.turns):
        messages.append({"role": "user", "content": f"How far {words.new('others')}?"})
        messages.extend(_answer(shape, words, len(messages), last=turn + 1 == shape.turns))
    if shape.edge == "user last":
        messages.append({"role": "user", "content": f"And {words.new('others')}"})
    arguments = {"tools": [_tool(words)]} if shape.answers.startswith("tools") else {}
    if shape.answers == "parts":
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages, arguments, words


def _answer(shape: Shape, words: Words, index: int, last: bool) -> list[dict[str, Any]]:
    answer = {"role": "assistant", "content": f"It is {words.new('assistant')}."}
    if "reasoning" in shape.answers:
        reasoning = f"I see {words.new('assistant')}"
        words.reasoning.append((index, words.assistant[-1]))
        if shape.answers == "reasoning in content":
            answer["content"] = f"<think>\n{reasoning}\n</think>\n\n{answer['content']}"
        else:
            answer["reasoning_content"] = reasoning
    words.last.append(words.assistant[0 if "reasoning" not in shape.answers else -2])
    words.last[-1] = re.findall(r"zq\w+qz", answer["content"])[-1]
    if not ("call" in shape.answers or "arguments" in shape.answers):
        return [answer]
    ending = shape.answers == "call at the end"
    if ending and not last:
        return [answer]
    calls = []
    for number in range(2 if shape.answers == "two calls" else 1):
        place = {"place": words.new("assistant"), "far": number + 2, "in": {"unit": words.new("assistant")}}
        arguments = json.dumps(place) if shape.answers == "arguments as text" else place
        function = {"name": words.new("names"), "arguments": arguments}
        calls.append({"id": f"call0000{len(words.names)}", "type": "function", "function": function})
    calling: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
    if shape.answers in ("calls with content", "reasoning and calls"):
        calling["content"] = f"Let me {words.new('assistant')}."
    if shape.answers == "reasoning and calls":
        calling["reasoning_content"] = answer.pop("reasoning_content")
    if ending:
        words.last[-1] = words.assistant[-1]
        words.assistant.remove(re.findall(r"zq\w+qz", answer["content"])[-1])
        return [calling]
    words.last.insert(len(words.last) - 1, words.assistant[-1 if "content" not in calling else -2])
    results = [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": f"Saw {words.new('others')}"}
        for call in calls
    ]
    return [calling, *results, answer]


def _tool(words: Words) -> dict[str, Any]:
    properties = {words.new("others"): {"type": "string", "description": words.new("others")}}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": words.new("others"), "description": words.new("others"), "parameters": parameters}
    return {"type": "function", "function": function}


def templates() -> dict[str, str | None]:
    """Texts of the templates of trl by name, and those of variants with marks under NAME_training."""
    specification = importlib.util.find_spec("trl")  # which imports nothing
    assert specification is not None and specification.submodule_search_locations
    folder = Path(specification.submodule_search_locations[0]) / "chat_templates"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


def names() -> list[str]:
    """Names of the templates that are no variants."""
    return [name for name in templates() if not name.endswith("_training")]


def make_tokenizer(template: str, sentencepiece: bool = False):
    """A BPE tokenizer with the special tokens of a template: of bytes, or of words with their spaces, as SentencePiece has."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = sorted({BOS, EOS, *SPECIAL.findall(template)})
    plain = [token for token in PLAIN if token in template]
    if sentencepiece:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token=EOS))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet: list[str] = ["▁", *map(chr, range(32, 127)), "\n"]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT, SPECIAL.sub(" ", template)], trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, chat_template=template)


@dataclass
class Judgement:
    """What is found of one template with one shape.

    Attributes:
        rendered: whether the template itself shows all words.
        refusal: why the row is refused; None where it is used.
        faults: what is wrong with its targets.
        differences: template text beside turns in which marks and targets differ.
        by_marks: whether marks were a judge.
    """

    rendered: bool
    refusal: str | None
    faults: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    by_marks: bool = False


class Judge:
    """A template and its tokenizer, asked about conversations.

    Args:
        name: of the template.
        sentencepiece: which tokenizer.
    """

    def __init__(self, name: str, sentencepiece: bool = False):
        texts = templates()
        self.name = name
        self.template, self.variant = str(texts[name]), texts.get(f"{name}_training")
        self.tokenizer = make_tokenizer(self.template + (self.variant or ""), sentencepiece)
        self.tokenizer.chat_template = self.template
        self.chat = ChatTemplate(self.tokenizer, ChatOptions(today()))

    def texts(self, messages: list[dict[str, Any]], arguments: dict[str, Any], template: str) -> Iterator[tuple[str, list]]:
        """A conversation under a template, in all ways in which it may be written, and how it is written."""
        for as_text, parts, empty in itertools.product((False, True), repeat=3):
            written = [_written(message, as_text, parts, empty) for message in messages]
            try:
                yield self._render(written, arguments, template), written
            except Exception:  # the template is a program and may refuse in any way
                continue

    def _render(self, messages: list[dict[str, Any]], arguments: dict[str, Any], template: str) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **arguments)

    def judge(self, shape: Shape) -> Judgement:
        """Use a conversation of a shape, and look at what comes of it."""
        messages, arguments, words = conversation(shape)
        dropped = self._dropped(messages, arguments, words)
        wanted = [word for word in (*words.assistant, *words.names, *words.others) if word not in dropped]
        honest = [
            (text, written)
            for text, written in self.texts(messages, arguments, self.template)
            if all(word in text for word in wanted) and "{'" not in text
        ]
        try:
            found = self.chat.tokens(messages, arguments)
        except BadRow as refusal:
            return Judgement(bool(honest), str(refusal))
        for text, written in honest:  # noqa: B007
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            if encoded["input_ids"] == found.token_ids.tolist():
                break
        else:
            return Judgement(bool(honest), None, ["its text is none that the template makes with all words"])
        places = encoded["offset_mapping"]
        judgement = Judgement(True, None, _by_words(text, places, found.is_target, words))
        marks = self._marks(text, written, arguments)
        if marks is not None:
            judgement.by_marks = True
            _by_marks(text, places, found.is_target, marks, judgement)
        return judgement

    def _dropped(self, messages: list[dict[str, Any]], arguments: dict[str, Any], words: Words) -> set[str]:
        """The words of reasoning that the template leaves out here, and shows where the conversation ends with it."""
        dropped = set()
        for index, word in words.reasoning:
            later = index + 1 < len(messages)
            cut = self.texts(messages[: index + 1], arguments, self.template)
            if later and any(word in text for text, _ in cut):
                dropped.add(word)
        return dropped

    def _marks(self, text: str, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> list[bool] | None:
        """What the variant marks; None where it makes another text."""
        try:
            if self.variant is None or self._render(messages, arguments, self.variant) != text:
                return None
            marked = self.tokenizer.apply_chat_template(
                messages, chat_template=self.variant, return_dict=True, return_assistant_tokens_mask=True, **arguments
            )
        except Exception:
            return None
        return list(map(bool, marked["assistant_masks"]))


def _written(message: dict[str, Any], as_text: bool, parts: bool, empty: bool) -> dict[str, Any]:
    """A message in one of the ways in which the same may be written."""
    written = dict(message)
    content = message.get("content", "" if empty else None)
    if content is not None:
        content = content if isinstance(content, str) else content[0]["text"]
        written["content"] = [{"type": "text", "text": content}] if parts else content
    if "tool_calls" in message:
        written["tool_calls"] = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if as_text is not isinstance(arguments, str):
                arguments = json.dumps(arguments) if as_text else json.loads(arguments)
            written["tool_calls"].append({**call, "function": {**call["function"], "arguments": arguments}})
    return written


def _by_words(text: str, places: list[tuple[int, int]], is_target: Any, words: Words) -> list[str]:
    """What is wrong with targets, as far as words that stand once tell."""
    faults = []

    def tokens(begin: int, end: int) -> list[bool]:
        return [bool(target) for (b, e), target in zip(places, is_target, strict=True) if b < end and e > begin]

    for word in words.assistant:
        for match in re.finditer(word, text):
            if not all(tokens(*match.span())):
                faults.append("a word of the assistant is no target")
    for word in words.names:  # templates may repeat the name of a call where they show what it gave
        if not all(tokens(*next(re.finditer(word, text)).span())):
            faults.append("the name of a call is no target")
    for word in words.others:
        if any(any(tokens(*match.span())) for match in re.finditer(word, text)):
            faults.append("a word of another role is a target")
    for word in words.last:
        begin = text.rindex(word) + len(word) if word in text else len(text)
        following = re.search("zq[a-z]+qz", text[begin:])
        end = ENDS.search(text, begin, begin + following.start() if following else len(text))
        if end and not all(tokens(*end.span())):
            faults.append("the end of a turn is no target")
    return faults


def _by_marks(text: str, places: list[tuple[int, int]], is_target: Any, marks: list[bool], judgement: Judgement) -> None:
    """Compare targets with marks; only template text beside a turn may differ."""
    for differing, names in itertools.groupby(range(len(marks)), key=lambda index: int(is_target[index]) - int(marks[index])):
        if not differing:
            continue
        tokens = list(names)
        piece = text[places[tokens[0]][0] : places[tokens[-1]][1]]
        what = f"{'more' if differing > 0 else 'less'} than the marks: {piece!r}"
        (judgement.differences if _is_beside(piece) else judgement.faults).append(what)


def _is_beside(piece: str) -> bool:
    return BESIDE.fullmatch(piece) is not None or HEADERS.fullmatch(piece) is not None


def main() -> None:
    """Judge all templates with all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the shapes of each template, drawn at random")
    parser.add_argument("--templates", nargs="*", help="names; all without")
    options = parser.parse_args()
    figures = {}
    for name in options.templates or names():
        figures[name] = table_row(Judge(name), random.Random(0).sample(SHAPES, max(1, round(options.share * len(SHAPES)))))
        row = figures[name]
        print(f"{name:<24} {row['used']:>4} / {row['rendered']:>4} / {row['pairs']:>4}  wrong {row['wrong']}", flush=True)
    counts = ("pairs", "rendered", "used", "by_marks", "wrong")
    all_templates = {count: sum(row[count] for row in figures.values()) for count in counts}
    keep("chat_templates", {"shapes": len(SHAPES), "all": all_templates, "templates": figures})


def table_row(judge: Judge, shapes: list[Shape]) -> dict[str, Any]:
    """What is counted of one template.

    pairs: with shapes. rendered: of which the template shows all words. used: of these. by_marks: of which the variant's marks
    were a judge. wrong: with faults.
    """
    judgements = {shape: judge.judge(shape) for shape in shapes}
    found = judgements.values()
    refusals = Counter((one.rendered, str(one.refusal).split(": ")[0]) for one in found if one.refusal is not None)
    return {
        "pairs": len(judgements),
        "rendered": sum(one.rendered for one in found),
        "used": sum(one.rendered and one.refusal is None for one in found),
        "by_marks": sum(one.by_marks for one in found),
        "wrong": sum(bool(one.faults) for one in found),
        "faults": dict(Counter(fault for one in found for fault in set(one.faults))),
        "differences": dict(Counter(difference for one in found for difference in set(one.differences))),
        "refused": {reason: count for (rendered, reason), count in refusals.items() if rendered},
        "not rendered": {reason: count for (rendered, reason), count in refusals.items() if not rendered},
    }


if __name__ == "__main__":
    main()
