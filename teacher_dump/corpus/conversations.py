"""Conversations as rows have them: which values are some, and what goes to a chat template beside them."""

from __future__ import annotations

import json
from typing import Any

Turns = list[dict[str, Any]]


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with a `role`."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value)
    )


def template_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """What goes to the chat template beside the messages. Raises ValueError, in words."""
    arguments = given.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise ValueError("`chat_template_kwargs` is not an object")
    tools = given.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`tools` is not JSON ({error})") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError("`tools` is not a list")
    return {**arguments, "tools": tools} if tools else dict(arguments)
