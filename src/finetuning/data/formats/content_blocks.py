"""Messages of the Anthropic API, whose content is a list of blocks: texts, thinking, tool calls and their results."""

from __future__ import annotations

import json
from collections.abc import Sequence

from finetuning.data.formats.row_format import FieldError, only_text, other_keys
from finetuning.data.samples import JsonObject, JsonValue, json_type

_NOT_TRAINED = {
    "image": "an image",
    "document": "a document",
    "redacted_thinking": "reasoning that is encrypted",
}
_RESULT_KEYS = {"type", "tool_use_id", "content", "is_error", "cache_control"}


def from_blocks(message: JsonObject, key: str) -> list[JsonValue]:
    """Return the messages that a message of blocks is made of.

    An assistant's message becomes one with `reasoning_content`, `content` and `tool_calls`. The results of tools, which
    are blocks of a user's message there, become messages of the role `tool`, in front of what the user says.

    Raises:
        FieldError: a block has an unknown type, or a position for which chat templates have no place.
    """
    extra = {name: value for name, value in message.items() if name not in ("role", "content")}
    if message.get("role") == "assistant":
        return [{"role": "assistant", **_answer(message["content"], f"{key}.content"), **extra}]
    results: list[JsonValue] = []
    rest: list[JsonObject] = []
    for index, block in enumerate(message["content"]):
        where = f"{key}.content[{index}]"
        if _type_of(block, where) == "tool_result":
            if rest:
                raise FieldError(where, "the result of a tool comes after a text: put the results first")
            results.append(_result(block, where))
        else:
            rest.append(block)
    if not rest:
        return results
    text = only_text(rest, f"{key}.content")
    return [*results, {"role": message.get("role"), "content": text, **other_keys(rest), **extra}]


def _answer(blocks: Sequence[JsonValue], key: str) -> JsonObject:
    """Return the fields of an assistant's message."""
    texts: list[JsonObject] = []
    thoughts: list[str] = []
    calls: list[JsonObject] = []
    unused: JsonObject = {}
    for index, block in enumerate(blocks):
        where = f"{key}[{index}]"
        kind = _type_of(block, where)
        assert isinstance(block, dict)
        if kind == "tool_use":
            calls.append(_call(block, where))
            unused |= other_keys([block], ("type", "id", "name", "input"))
            continue
        if calls:
            raise FieldError(where, f"{kind} comes after a tool call, for which chat templates have no place")
        if kind == "thinking":
            if texts:
                raise FieldError(where, "thinking comes after the text, for which chat templates have no place")
            thoughts.append(_text(block, "thinking", where))
            unused |= other_keys([block], ("type", "thinking"))
        else:
            texts.append(block)
    answer: JsonObject = {"content": only_text(texts, key) if texts else None, **other_keys(texts)}
    if thoughts:
        answer["reasoning_content"] = "\n".join(thoughts)
    if calls:
        answer["tool_calls"] = calls
    return answer | unused


def _type_of(block: JsonValue, key: str) -> str:
    if not isinstance(block, dict):
        raise FieldError(key, f"expected an object with a type, got {json_type(block)}")
    kind = block.get("type", "text")
    if kind in _NOT_TRAINED:
        raise FieldError(key, f"holds {_NOT_TRAINED[kind]}, on which the engine does not train")
    if kind not in ("text", "thinking", "tool_use", "tool_result"):
        raise FieldError(key, f"expected text, got a part of type {kind}")
    return kind


def _text(block: JsonObject, name: str, key: str) -> str:
    value: JsonValue = block.get(name)
    if not isinstance(value, str):
        raise FieldError(f"{key}.{name}", f"expected text, got {json_type(value)}")
    return value


def _call(block: JsonObject, key: str) -> JsonObject:
    arguments: JsonValue = block.get("input") or {}
    if not isinstance(arguments, dict):
        raise FieldError(f"{key}.input", f"expected an object, got {json_type(arguments)}")
    call: JsonObject = {"type": "function", "function": {"name": _text(block, "name", key), "arguments": arguments}}
    return {"id": block["id"], **call} if block.get("id") else call


def _result(block: JsonObject, key: str) -> JsonObject:
    """Return a message of the role `tool`. A result may be a text, or a list with one part."""
    unknown = sorted(block.keys() - _RESULT_KEYS)
    if unknown:
        raise FieldError(f"{key}.{unknown[0]}", "is not a key of a tool's result")
    content: JsonValue = block.get("content")
    unused = other_keys([block], ("type", "tool_use_id", "content"))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        unused |= other_keys(content)
        content = only_text(content, f"{key}.content") if content else ""
    elif content is not None and not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    result: JsonObject = {"role": "tool", "content": content or "", **unused}
    return {**result, "tool_call_id": block["tool_use_id"]} if block.get("tool_use_id") else result
