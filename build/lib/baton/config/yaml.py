"""Read a YAML file by the YAML 1.2 core schema and remember the line of every key.

PyYAML parses; only what a scalar means, and what is refused, is decided here. PyYAML itself
follows YAML 1.1, where `3e-4` is text, `24:00:00` is 86400, `no` is false and 012 is ten.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from baton.config.document import Document, KeyPath, clip, dotted
from baton.config.scalar import plain
from baton.errors import ConfigError

_PLAIN = "!plain"  # our tag for a scalar with neither quotes nor a tag of its own
_STR, _SEQ, _MAP = (f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))

# Part of PyYAML's message; our words where PyYAML's are a parser's own ("" keeps them); advice.
_EXPLANATIONS = [
    ("mapping values are not", "': ' in a value", "quote the text, or mend the indentation"),
    ("cannot start any token", "", "put the text in quotes"),
    ("expected ':'", "no ':' follows this text", "write 'key: value', or quote the text"),
    ("expected <block end>", "this does not continue the lines above", "mend indents or brackets"),
    ("expected ',' or", "", "close the bracket, or put the text in quotes"),
    ("undefined alias", "", "put text that begins with * in quotes"),
    ("scanning an a", "not the name of an anchor", "put text that begins with * or & in quotes"),
    ("unexpected end of stream", "these quotes are never closed", "close them"),
    ("escape character", "", "write two backslashes, or use single quotes"),
    ("another document", "a second document begins", "keep one document in a file"),
]


def load_yaml(path: Path) -> Document:
    """Read a file whose top level is a mapping. ConfigError names file, line and text."""
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=_Loader)
        builder = _Builder(f"{path}:")
        data: Any = None if root is None else builder.value(root, ())
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_problem(path, text, error)) from error
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply to be read; flatten it") from None
    if root is None:
        raise ConfigError(f"{path}: the file is empty; expected 'key: value' lines")
    line = root.start_mark.line + 1
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise ConfigError(
            f"{path}:{line}: the top level is {kind}; expected a mapping ('key: value' lines)"
        )
    builder.raise_problems()
    return Document(str(path), data, MappingProxyType({(): line, **builder.lines}))


def parse_scalar(text: str) -> Any:
    """Value of `--set key=VALUE`: a scalar, `[a, b]` or `{a: 1}`.

    What only a file can mean stays text: `Answer: yes`, `- x`, `#5`.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return text.strip() or None  # no value at all, or what would be a comment in a file
        if isinstance(root, yaml.CollectionNode) and not root.flow_style:
            return text
        builder = _Builder(f"{text!r}, line ")
        value = builder.value(root, ())
    except yaml.YAMLError as error:
        what, advice = _explain(error)
        raise ConfigError(f"{text!r}: not a YAML value: {what}; {advice}") from error
    except RecursionError:
        raise ConfigError(f"{clip(text)!r}: nested too deeply to be read; flatten it") from None
    builder.raise_problems()
    return value


class _Loader(yaml.SafeLoader):
    """Leaves the meaning of plain scalars to `plain`."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]


class _Builder:
    """Turns nodes into dicts, lists and scalars; collects lines and problems on the way.

    An anchored node is built anew wherever it is used, so no two keys share a mapping.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[tuple[int, str]] = []
        self.open: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if any(node is outer for outer in self.open):
            return self.problem(node, path, "the anchor contains itself; write the value out")
        if node.tag not in (_PLAIN, _STR, _SEQ, _MAP):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            return self.problem(node, path, f"the tag {tag} is not supported; remove it")
        if isinstance(node, yaml.ScalarNode):
            return plain(node.value) if node.tag == _PLAIN else node.value
        self.open.append(node)
        build = self.mapping if isinstance(node, yaml.MappingNode) else self.sequence
        value = build(node, path)
        self.open.pop()
        return value

    def sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        for index, item in enumerate(node.value):
            self.lines[(*path, index)] = item.start_mark.line + 1
        return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode) or (key.tag, key.value) == (_PLAIN, ""):
                self.problem(key, path, "a key must be text; put '{…}' or '[…]' in quotes")
            elif key.value in own:
                first = own[key.value][0].start_mark.line + 1
                what = f"duplicate key, first on line {first}; keep one of them"
                self.problem(key, (*path, key.value), what)
            elif (key.tag, key.value) == (_PLAIN, "<<"):
                result |= self.merged(item, path)
            else:
                own[key.value] = key, item
        for name, (key, item) in own.items():
            self.lines[(*path, name)] = key.start_mark.line + 1
            result[name] = self.value(item, (*path, name))
        return result

    def merged(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """Keys that `<<` brings in; of several mappings, the first that has a key wins."""
        result: dict[str, Any] = {}
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in reversed(sources):
            if isinstance(source, yaml.MappingNode):
                result |= self.value(source, path) or {}
            else:
                self.problem(source, path, "'<<' takes a mapping or a list of mappings")
        return result

    def problem(self, node: yaml.Node, path: KeyPath, what: str) -> None:
        line = node.start_mark.line + 1
        prefix = f"{dotted(path)}: " if path else ""
        self.problems.append((line, f"{self.name}{line}: {prefix}{what}"))

    def raise_problems(self) -> None:
        if self.problems:
            # An anchored mapping used twice reports its problems twice.
            raise ConfigError([text for _, text in sorted(set(self.problems))])


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}; "
            "save the file as UTF-8"
        ) from None


def _syntax_problem(path: Path, text: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        found = f"U+{ord(text[error.position]):04X}"
        return f"{path}:{line}:{column}: the character {found} is not allowed; remove it"
    assert isinstance(error, yaml.MarkedYAMLError), error
    rows = [*text.splitlines(), ""]
    mark = error.problem_mark or error.context_mark
    assert mark is not None, error
    # What is never closed is noticed at the end of the file; the beginning is what helps.
    if error.context_mark is not None and not "".join(rows[mark.line :]).strip():
        mark = error.context_mark
    row = rows[mark.line]
    what, advice = _explain(error)
    if "\t" in row[: len(row) - len(row.lstrip())]:
        what, advice = "the line is indented with a tab", "use spaces"
    place = f"{path}:{mark.line + 1}:{mark.column + 1}"
    return f"{place}: {what}, in {clip(row.strip())!r}; {advice}"


def _explain(error: yaml.YAMLError) -> tuple[str, str]:
    """What is wrong and what to do, in words for people who write YAML and no parsers."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "a character that YAML does not allow", "remove it"
    problem = (error.problem or "not understood").replace("'<stream end>'", "the end")
    for part, words, advice in _EXPLANATIONS:
        if part in f"{error.context} {problem}":
            return words or problem, advice
    return problem, "put the text in quotes, or mend the line"
