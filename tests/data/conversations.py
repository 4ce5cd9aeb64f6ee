"""Conversations whose words say who spoke them: `Uone` a user, `Aone` an assistant, `Sone` a system or a tool."""

from __future__ import annotations

import re
from typing import Any

from finetuning.data.samples import Conversation
from finetuning.errors import Location

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "a name"}},
                "required": ["city"],
            },
        },
    }
]
_CALL = [{"id": "abc123456", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Acity"}}}]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [user("Uone"), assistant("Aone Atwo")],
    "multi": [user("Uone is?"), assistant("Aone"), user("And Utwo?"), assistant("Atwo is Athree.\nAfour.")],
    "system": [{"role": "system", "content": "Sone."}, user("Uone"), assistant("Aone")],
    "tools": [
        user("Uone in?"),
        assistant(None, tool_calls=_CALL),
        {"role": "tool", "name": "get_weather", "tool_call_id": "abc123456", "content": "Sone"},
        assistant("Aone is it."),
    ],
    "tools and words": [
        user("Uone in?"),
        assistant("Aone.", tool_calls=_CALL),
        {"role": "tool", "name": "get_weather", "tool_call_id": "abc123456", "content": "Sone"},
        assistant("Atwo is it."),
    ],
    "consecutive": [user("Uone"), assistant("Aone"), assistant("Atwo"), user("Utwo"), assistant("Athree")],
    "empty": [user("Uone"), assistant(""), user("Utwo"), assistant("Aone")],
    "thinking": [
        user("Uone"),
        assistant("<think>\nhmm\n</think>\n\nAone"),
        user("Utwo"),
        assistant("<think>\nlet me\n</think>\n\nAtwo"),
    ],
    "reasoning": [
        user("Uone"),
        assistant("Aone", reasoning_content="hmm"),
        user("Utwo"),
        assistant("Atwo", reasoning_content="let me"),
    ],
    "emoji": [user("Uone ü 🙂"), assistant("👩‍👩‍👧 Aone 你好 é 🙂"), user("🙂 Utwo"), assistant("🙂")],
    "markers": [
        user("Uone <|im_end|> <|user|> </s> [/INST] <end_of_turn>"),
        assistant("<|im_start|>assistant\nAone<|im_end|> <|eot_id|> Atwo"),
        user("Utwo"),
        assistant("Athree"),
    ],
    "white space": [user("  Uone \n"), assistant("\n\n  Aone \n\n"), user(" Utwo"), assistant(" Atwo ")],
    "assistant first": [assistant("Aone!"), user("Uone"), assistant("Atwo")],
    "repeated": [user("Uone"), assistant("Aone"), user("Uone"), assistant("Aone")],
}

_WORD = re.compile(r"\b([UAS])(?:one|two|three|four|city)\b")


def conversation(name: str) -> Conversation:
    return Conversation(CONVERSATIONS[name], Location("x.jsonl", 1), TOOLS if name.startswith("tools") else None)


def speakers(text: str) -> set[str]:
    """The letters of those who spoke the words of a text."""
    return set(_WORD.findall(text))


def words(name: str, roles: tuple[str, ...] = ("assistant",)) -> list[str]:
    """The marked words of the messages of some roles, in order."""
    text = " ".join(str(message) for message in CONVERSATIONS[name] if message["role"] in roles)
    return [match.group() for match in _WORD.finditer(text)]
