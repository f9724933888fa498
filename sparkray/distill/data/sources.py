"""Documents to distil on: Python's own documentation and library sources, which every machine has, or files."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sparkray.errors import InputError, NotFoundError

# Rows of other tools call their text by one of these names.
_TEXT_KEYS = ("text", "content", "input")
_TOY_CHARACTERS = 1_500
BUILT_IN = ("python-docs", "python-stdlib", "toy")


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        name: unique in its source.
        source: `python-docs`, `python-stdlib`, or what a row of a file says.
        text: not empty.
    """

    name: str
    source: str
    text: str


def read_documents(source: str) -> list[Document]:
    """Documents of a built-in source, or of a .jsonl or .txt file.

    Raises:
        NotFoundError: neither a source nor a file.
        InputError: a file without text.
    """
    if source == "python-docs":
        return list(python_documentation())
    if source == "python-stdlib":
        return list(standard_library())
    if source == "toy":
        return toy_documents()
    path = Path(source)
    if not path.is_file():
        raise NotFoundError(
            f"{source!r} is no file, and no built-in source either.",
            hint=f"Give a .jsonl or .txt file, or one of {', '.join(BUILT_IN)}.",
            param="data",
        )
    documents = list(_of_file(path))
    if not documents:
        raise InputError(f"{path} holds no text.", param="data")
    return documents


def python_documentation() -> Iterator[Document]:
    """The topics of the language reference, as `help()` shows them: about 465 KB."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(name, "python-docs", text)


def standard_library() -> Iterator[Document]:
    """The library's modules in Python, without its tests: about 5 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(path.name, "python-stdlib", text)


def toy_documents() -> list[Document]:
    """The beginnings of sixteen topics and eight modules: for tests of seconds."""
    chosen = [*islice(python_documentation(), 16), *islice(standard_library(), 8)]
    return [Document(found.name, found.source, found.text[:_TOY_CHARACTERS]) for found in chosen]


def write_documents(documents: list[Document], path: Path) -> None:
    """One JSON row a document, `{"text", "source", "name"}`; written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps({"text": d.text, "source": d.source, "name": d.name}) for d in documents)
    building = path.with_name(f"{path.name}.building")
    building.write_text("\n".join(rows) + "\n", encoding="utf-8")
    building.rename(path)


def _of_file(path: Path) -> Iterator[Document]:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        if text.strip():
            yield Document(path.name, path.stem, text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"line {number} of {path} is not JSON.", param="data") from None
        found = next((row[key] for key in _TEXT_KEYS if row.get(key)), None) if isinstance(row, dict) else None
        if not isinstance(found, str):
            raise InputError(f"line {number} of {path} has no text under {', '.join(_TEXT_KEYS)}.", param="data")
        yield Document(str(row.get("name", number)), str(row.get("source", path.stem)), found)
