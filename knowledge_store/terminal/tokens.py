"""Tokens as a person reads them: where each ends, which count for training, and white space that can be seen.

Nothing depends on colours alone: a pipe and a log show the same signs.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text

from knowledge_store.sql.answers import visible

BORDER = "│"
TARGETS = "⟦", "⟧"
WHITE_SPACE = {" ": "·", "\n": "↵\n", "\t": "⇥"}

TARGET, CONTEXT, SPECIAL = "bold green", "dim", "cyan"


def shown_tokens(tokens: Iterable[tuple[str, bool, bool]]) -> Text:
    """Tokens, each given as its text, whether it is a target, and whether it is a special token."""
    shown = Text()
    inside, first = False, True
    for text, is_target, is_special in tokens:
        if inside and not is_target:
            shown.append(TARGETS[1], TARGET)
        if not first and not shown.plain.endswith("\n"):
            shown.append(BORDER, CONTEXT)
        if is_target and not inside:
            shown.append(TARGETS[0], TARGET)
        inside, first = is_target, False
        words = "".join(WHITE_SPACE.get(character) or visible(character) for character in text)
        style = TARGET if is_target else SPECIAL if is_special else CONTEXT
        shown.append(words, f"{style} underline" if is_special and is_target else style)
    if inside:
        shown.append(TARGETS[1], TARGET)
    shown.rstrip()
    return shown
