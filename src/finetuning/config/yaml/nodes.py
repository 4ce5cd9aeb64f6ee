"""YAML text to a tree of nodes, within limits: the part of reading that a hostile file meets first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from finetuning.errors import ConfigError, Place

MOST_NODES = 10_000
MOST_LEVELS = 32

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}


@dataclass
class Node:
    """A scalar, list or mapping of the file, with its 1-based line and column.

    `nodes` and `levels` count what lies below it after every alias has been replaced by what it stands for.
    """

    kind: str
    line: int
    column: int
    text: str = ""
    is_plain: bool = False
    tag: str | None = None
    items: list[Node] = field(default_factory=list)
    """A list's items; a mapping's keys and values in turn."""
    nodes: int = 1
    levels: int = 0
    is_open: bool = True


class _Composer:
    """Puts YAML events together to one tree, and stops as soon as a limit is passed."""

    def __init__(self, file: str | None):
        self.file = file
        self.anchors: dict[str, Node] = {}
        self.open: list[Node] = []
        self.root: Node | None = None
        self.total = 0

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.AliasEvent):
            self._add(self._aliased(event))
        elif isinstance(event, yaml.ScalarEvent):
            node = self._node("scalar", event)
            node.text, node.is_plain = event.value, event.implicit[0] and event.tag is None
            node.is_open = False
            self._add(node)
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            node = self._node("list" if isinstance(event, yaml.SequenceStartEvent) else "mapping", event)
            self.open.append(node)
            if len(self.open) > MOST_LEVELS:
                raise self._error(f"sections are nested more than {MOST_LEVELS} levels deep", event)
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            node = self.open.pop()
            node.is_open = False
            self._add(node)

    def _node(self, kind: str, event: Any) -> Node:
        mark = event.start_mark
        if event.tag not in (None, "!") and event.tag not in _PLAIN_TAGS:
            raise self._error(f'the tag "{event.tag}" is not allowed: only plain values are', event)
        node = Node(kind, mark.line + 1, mark.column + 1, tag=event.tag)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        self._count(1, event)
        return node

    def _aliased(self, event: yaml.AliasEvent) -> Node:
        node = self.anchors.get(event.anchor)
        if node is None:
            raise self._error(f'"*{event.anchor}" stands for nothing: there is no "&{event.anchor}" before it', event)
        if node.is_open:
            raise self._error(f'"*{event.anchor}" stands inside of what it stands for', event)
        self._count(node.nodes, event)
        if len(self.open) + node.levels > MOST_LEVELS:
            raise self._error(f"sections are nested more than {MOST_LEVELS} levels deep", event)
        return node

    def _add(self, node: Node) -> None:
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        parent.items.append(node)
        parent.nodes += node.nodes
        parent.levels = max(parent.levels, node.levels + 1)

    def _count(self, nodes: int, event: yaml.Event) -> None:
        self.total += nodes
        if self.total > MOST_NODES:
            raise self._error(f"more than {MOST_NODES:,} values, aliases counted in: this is no config", event)

    def _error(self, message: str, event: yaml.Event) -> ConfigError:
        mark = event.start_mark
        return ConfigError(message, place=Place(self.file, mark.line + 1, mark.column + 1))


def compose(text: str, file: str | None) -> Node | None:
    """The tree of the one document in a text, aliases resolved; None when the text holds nothing.

    Raises:
        ConfigError: a limit is passed, there is a second document, or a tag or alias is not allowed.
        yaml.YAMLError: the text is not YAML.
    """
    composer = _Composer(file)
    documents = 0
    # Events, and not the loader's own tree: the limits must stop the parser while it reads.
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                line = event.start_mark.line + 1
                raise ConfigError(
                    f"one document expected, the second starts at line {line}", place=Place(file, line, 1)
                )
        composer.take(event)
    root = composer.root
    is_nothing = root is not None and root.kind == "scalar" and root.is_plain and root.text == ""
    return None if is_nothing else root
