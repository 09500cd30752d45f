"""Sets a source's offset in a rig file and leaves every other character of it alone.

The file is a person's: comments, order and layout stay. Only the block of the one source is touched, by the places that
YAML's own parser gives; the result is parsed again, and if anything else in it differs from before (an anchor that two
sources share, a merge) nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError
from pipeline.strict import Document

KEYS = ("offset_ms", "offset_uncertainty_ms")


def with_offset(document: Document, source: str, offset_ms: float, uncertainty_ms: float) -> Document:
    """``document`` with these values in the block of ``source``. ConfigError if it cannot be done safely."""
    values = dict(zip(KEYS, (offset_ms, uncertainty_ms), strict=True))
    text = document.text
    for key, value in values.items():
        text = _with_key(Document(text, document.path), source, key, f"{value:g}")
    edited = Document(text, document.path)
    wanted: dict[str, Any] = dict(document.value)
    wanted["sources"] = wanted["sources"] | {source: wanted["sources"][source] | values}
    if edited.value != wanted:
        raise _unsafe(document, source, "the block is shared with something else")
    return edited


def write(document: Document) -> None:
    """Writes the document over its file, whole or not at all."""
    path = document.path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(document.text)
        os.chmod(name, path.stat().st_mode & 0o7777)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def load_exactly(path: Path) -> Document:
    """The document with its line ends as they are. ConfigError."""
    Document.load(path)  # says in words what is wrong with the file
    return Document(path.read_bytes().decode("utf-8"), path)


def _with_key(document: Document, source: str, key: str, value: str) -> str:
    text = document.text
    block = _child(_child(yaml.compose(text, yaml.SafeLoader), "sources"), source)
    if not isinstance(block, yaml.MappingNode) or not block.value:
        raise _unsafe(document, source, "it is no mapping with keys")
    held = _child(block, key)
    if held is not None:
        if not isinstance(held, yaml.ScalarNode) or held.style is not None:
            raise _unsafe(document, source, f"its `{key}` is no plain number")
        return text[: held.start_mark.index] + value + text[held.end_mark.index :]
    first = block.value[0][0].start_mark
    if block.flow_style:
        return _behind_last(document, source, block, f"{key}: {value}")
    line_start = text.rfind("\n", 0, first.index) + 1
    indent = text[line_start : first.index]
    if indent.strip():
        raise _unsafe(document, source, "its first key does not begin a line")
    newline = "\r\n" if "\r\n" in text else "\n"
    return text[: first.index] + f"{key}: {value}{newline}{indent}" + text[first.index :]


def _behind_last(document: Document, source: str, block: yaml.MappingNode, entry: str) -> str:
    """Into a mapping in braces, behind its last entry."""
    text, last = document.text, block.value[-1][1]
    if last.start_mark.index < block.start_mark.index:  # an alias: its places are elsewhere
        raise _unsafe(document, source, "its last value is an alias")
    at = last.end_mark.index
    while text[at - 1].isspace():
        at -= 1
    return text[:at] + f", {entry}" + text[at:]


def _child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if name.value == key), None)


def _unsafe(document: Document, source: str, why: str) -> ConfigError:
    return document.error(("sources", source), f"the offset cannot be written here safely: {why}. Write it yourself.")
