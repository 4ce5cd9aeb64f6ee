"""Read YAML strictly: values with line and column, limits on size and nesting, and YAML 1.2 scalars.

Events are composed into a tree of nodes, nodes are resolved to Python values, and each key gets its position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import yaml

from finetuning.config.redaction import redact_line
from finetuning.config.validation.suggestions import near_file
from finetuning.config.yaml.document import ConfigDocument, KeyPath, SourceSpan, YamlSection, YamlValue
from finetuning.errors import ConfigError, Location

MAX_NODES = 10_000
MAX_DEPTH = 32

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}


@dataclass
class Node:
    """A scalar, list or mapping with its 1-based line and column.

    `nodes` and `levels` are the size and depth of the subtree with all aliases expanded.
    """

    kind: str
    line: int
    column: int
    text: str = ""
    is_plain: bool = False
    tag: str | None = None
    items: list[Node] = field(default_factory=list["Node"])
    """The items of a list; keys and values of a mapping, alternating."""
    nodes: int = 1
    levels: int = 0
    is_open: bool = True


class _Composer:
    """Composes YAML events into a tree, and stops as soon as a limit is exceeded."""

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
            if len(self.open) > MAX_DEPTH:
                raise self._error(f"sections are nested more than {MAX_DEPTH} levels deep", event)
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            node = self.open.pop()
            node.is_open = False
            self._add(node)

    def _node(self, kind: str, event: yaml.ScalarEvent | yaml.SequenceStartEvent | yaml.MappingStartEvent) -> Node:
        mark = event.start_mark
        if event.tag not in (None, "!") and event.tag not in _PLAIN_TAGS:
            raise self._error(f'the tag "{event.tag}" is not allowed: write a plain value', event)
        node = Node(kind, mark.line + 1, mark.column + 1, tag=event.tag)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        self._count(1, event)
        return node

    def _aliased(self, event: yaml.AliasEvent) -> Node:
        node = self.anchors.get(event.anchor)
        if node is None:
            raise self._error(
                f'undefined alias "*{event.anchor}": there is no anchor "&{event.anchor}" before it', event
            )
        if node.is_open:
            raise self._error(f'recursive alias "*{event.anchor}"', event)
        self._count(node.nodes, event)
        if len(self.open) + node.levels > MAX_DEPTH:
            raise self._error(f"sections are nested more than {MAX_DEPTH} levels deep", event)
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
        if self.total > MAX_NODES:
            raise self._error(f"more than {MAX_NODES:,} values, aliases included: this is not a config", event)

    def _error(self, message: str, event: yaml.Event) -> ConfigError:
        mark = event.start_mark
        return ConfigError(message, location=Location(self.file, mark.line + 1, mark.column + 1))


def compose(text: str, file: str | None) -> Node | None:
    """Return the tree of the only document in a text, with aliases resolved; None if the text is empty.

    Raises:
        ConfigError: a limit is exceeded, there is a second document, or a tag or alias is not allowed.
        yaml.YAMLError: the text is not valid YAML.
    """
    composer = _Composer(file)
    documents = 0
    # Events, and not the loader's tree: the limits must stop the parser while it reads.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    events = cast("Iterator[yaml.Event]", yaml.parse(text, Loader=loader))  # pyright: ignore[reportUnknownMemberType]
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                line = event.start_mark.line + 1
                raise ConfigError(
                    f"one document expected, the second starts at line {line}", location=Location(file, line, 1)
                )
        composer.take(event)
    root = composer.root
    is_nothing = root is not None and root.kind == "scalar" and root.is_plain and root.text == ""
    return None if is_nothing else root


_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*")
_BASED = re.compile(r"([-+]?)0([xob])([0-9a-fA-F]+(?:_[0-9a-fA-F]+)*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.(?:[0-9]+(?:_[0-9]+)*)?(?:[eE][-+]?[0-9]+)?"
    r"|\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+)"
)
_INFINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")
_NOT_A_NUMBER = frozenset({".nan", ".NaN", ".NAN"})
_BASES = {"x": 16, "o": 8, "b": 2}
# Longer runs of digits are names or hashes, and Python refuses to read very long ones.
_MOST_DIGITS = 100


def read_scalar(text: str) -> str | int | float | bool | None:
    """The value of an unquoted YAML word.

    YAML 1.2 without its surprises: `1e-5` is a number, `010` is ten, `1:30`, dates, yes, no, on and off are text.

    >>> [read_scalar(word) for word in ("1e-5", "010", "1:30", "no", "TRUE", "~", "1_000", "0x1F")]
    [1e-05, 10, '1:30', 'no', True, None, 1000, 31]
    """
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if len(text) > _MOST_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _read_rare(text)


def _read_rare(text: str) -> str | int | float:
    based = _BASED.fullmatch(text)
    if based:
        sign, base, digits = based.groups()
        try:
            value = int(digits, _BASES[base])
        except ValueError:
            return text
        return -value if sign == "-" else value
    infinite = _INFINITE.fullmatch(text)
    if infinite:
        return float(f"{infinite.group(1)}inf")
    return float("nan") if text in _NOT_A_NUMBER else text


MAX_BYTES = 1_000_000
_FORBIDDEN_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ufffe\uffff]")
_TAG = "tag:yaml.org,2002:"


def read_document(path: str | Path) -> ConfigDocument:
    """Read a YAML file. The document has no values if the file is empty.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, not valid YAML, or not a mapping at the top level.
    """
    file = str(path)
    try:
        with _announced(path), open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("no such file", location=Location(file), hint=near_file(file)) from None
    except IsADirectoryError:
        raise ConfigError("is a directory, not a YAML file", location=Location(file)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", location=Location(file)) from None
    except ValueError:
        raise ConfigError("is not the name of a file", location=Location(repr(file))) from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES:,} bytes: this is not a config", location=Location(file))
    return parse_document(_decode(content, file), file)


def _announced(path: str | Path) -> AbstractContextManager[None]:
    """Return a context that says it if a named pipe is waited for."""
    if not Path(path).is_fifo():
        return nullcontext()
    from finetuning.distributed import announce_wait

    return announce_wait(f"{path} to be written: it is a pipe")


def parse_document(text: str, file: str | None = None) -> ConfigDocument:
    """Parse a YAML text.

    Raises:
        ConfigError: the text is not valid YAML, or not a mapping at the top level.
    """
    root = _parse(text, file)
    if root is None:
        return ConfigDocument({}, file=file)
    if root.kind != "mapping":
        kind = "a list" if root.kind == "list" else "a single value"
        raise ConfigError(f"expected sections (keys and values), found {kind}", location=Location(file, root.line))
    builder = _Builder(file)
    values = builder.section(root, ())
    return ConfigDocument(values, builder.marks, file)


def parse_value(text: str, source: str) -> YamlValue:
    """Parse a short YAML text, such as the right side of an override.

    Raises:
        ConfigError: the text is not valid YAML.
    """
    root = _parse(text, source)
    return None if root is None else _Builder(source).value(root, ())


def _parse(text: str, file: str | None) -> Node | None:
    text = text.removeprefix("\ufeff")
    forbidden = _FORBIDDEN_CHARACTER.search(text)
    if forbidden:
        line, column = _line_and_column(text, forbidden.start())
        name = f"U+{ord(forbidden.group()):04X}"
        raise ConfigError(f"the character {name} is not allowed in YAML", location=Location(file, line, column))
    try:
        return compose(text, file)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"is not YAML: {error}", location=Location(file)) from None


def _decode(content: bytes, file: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise ConfigError(
            f"byte 0x{content[error.start]:02x} at offset {error.start} is not UTF-8.",
            location=Location(file, line, column),
            hint="Save the file as UTF-8.",
        ) from None


def _line_and_column(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _syntax_error(error: yaml.MarkedYAMLError, text: str, file: str | None) -> ConfigError:
    """Return the parser's error with the line in question, and a caret below the column."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return ConfigError(f"is not YAML: {error.problem or error.context}", location=Location(file))
    lines = text.splitlines() or [""]
    row, column = mark.line, mark.column
    if row >= len(lines):
        row, column = len(lines) - 1, len(lines[-1])
    line = lines[row]
    message = error.problem or "is not YAML"
    if "\\t" in message or "\t" in line[: len(line) - len(line.lstrip())]:
        message = "a tab cannot indent YAML; use spaces"
        column = line.index("\t") if "\t" in line else column
    elif error.context and error.context_mark is not None:
        message = f"{message}, {error.context} that begins at line {error.context_mark.line + 1}"
    excerpt = redact_line(line.expandtabs(1))[:160]
    caret = " " * min(column, len(excerpt)) + "^"
    return ConfigError(f"{message}\n    {excerpt}\n    {caret}", location=Location(file, row + 1, column + 1))


class _Builder:
    """Converts nodes to Python values, and records the position of each key and list item."""

    def __init__(self, file: str | None):
        self.file = file
        self.marks: dict[KeyPath, SourceSpan] = {}

    def value(self, node: Node, path: KeyPath) -> YamlValue:
        if node.kind == "scalar":
            return self._scalar(node)
        if node.kind == "list":
            values: list[YamlValue] = []
            for index, item in enumerate(node.items):
                self.marks[(*path, index)] = SourceSpan(item.line, item.column)
                values.append(self.value(item, (*path, index)))
            return values
        return self.section(node, path)

    def section(self, node: Node, path: KeyPath) -> YamlSection:
        result: YamlSection = {}
        for key, (key_node, item) in self._entries(node).items():
            self.marks[(*path, key)] = SourceSpan(key_node.line, key_node.column)
            result[key] = self.value(item, (*path, key))
        return result

    def _entries(self, node: Node) -> dict[str | int, tuple[Node, Node]]:
        """Return a mapping's keys with their key and value nodes. Direct keys take precedence over merged ones
        (`<<`)."""
        entries: dict[str | int, tuple[Node, Node]] = {}
        merged: list[Node] = []
        merge_node: Node | None = None
        for key_node, item in zip(node.items[::2], node.items[1::2], strict=True):
            if key_node.kind == "scalar" and key_node.is_plain and key_node.text == "<<":
                if merge_node is not None:
                    raise self._duplicate("<<", merge_node, key_node)
                merge_node = key_node
                merged = item.items if item.kind == "list" else [item]
                continue
            key = self._key(key_node)
            if key in entries:
                raise self._duplicate(key, entries[key][0], key_node)
            entries[key] = (key_node, item)
        for section in merged:
            if section.kind != "mapping":
                raise self._error('"<<" takes a section, or a list of sections', merge_node or node)
            for key, entry in self._entries(section).items():
                entries.setdefault(key, entry)
        return entries

    def _key(self, node: Node) -> str | int:
        key = self._scalar(node) if node.kind == "scalar" else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise self._error("a key must be text or a whole number", node)
        return key

    def _scalar(self, node: Node) -> str | int | float | bool | None:
        if node.tag is None or node.tag == "!":
            return read_scalar(node.text) if node.is_plain else node.text
        expected = node.tag.removeprefix(_TAG)
        if expected == "str":
            return node.text
        value = read_scalar(node.text)
        kinds = {"int": int, "float": int | float, "bool": bool, "null": type(None)}
        is_right = isinstance(value, kinds.get(expected, ())) and (expected == "bool" or not isinstance(value, bool))
        if not is_right:
            raise self._error(f"does not fit its tag !!{expected}", node)
        return float(value) if expected == "float" and isinstance(value, int) else value

    def _duplicate(self, key: str | int, first: Node, second: Node) -> ConfigError:
        return self._error(f'"{key}" is written twice, at line {first.line} and at line {second.line}', second)

    def _error(self, message: str, node: Node) -> ConfigError:
        return ConfigError(message, location=Location(self.file, node.line, node.column))
