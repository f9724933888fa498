"""What the pages tell a user to type exists: every `sparkray NOUN VERB --flag`, every file, every key of METIS."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.core

from sparkray.cli.main import app
from sparkray.metis.options import KEYS

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
SOURCES = sorted([*(REPOSITORY / "sparkray").rglob("*.py"), *(REPOSITORY / "jobs").glob("*.py")])

ROOT = typer.main.get_command(app)

_FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`+([^`\n]+)`+")
_COMMAND = re.compile(r"(?<![\w./-])sparkray((?: +[^\s`'\"();,#|.]+(?:\|[a-z]+)*)+)")
_FILE = re.compile(r"(?<![\w.~/-])(?:docs|configs|serve_apps|jobs|dashboards|benchmarks|tests|sparkray)/[\w./-]*\w")


def commands_in(text: str) -> list[list[str]]:
    """The words after each `sparkray` of a piece of code."""
    return [words.split() for words in _COMMAND.findall(text.replace("\\\n", " "))]


def code_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return "\n".join([*_FENCE.findall(text), *_SPAN.findall(_FENCE.sub("", text))])


def complaint(words: list[str]) -> str | None:
    """Why this is no command of ours, or None."""
    command: Any = ROOT
    for number, word in enumerate(words):
        if word.startswith("-"):
            known = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts}
            if word.partition("=")[0] not in known | {"--help"}:
                return f"`{command.name}` has no {word}"
        elif isinstance(command, typer.core.TyperGroup):
            verbs = word.split("|")
            if missing := [verb for verb in verbs if verb not in command.commands and not verb.isupper()]:
                return f"`{' '.join(words[: number + 1])}`: no {missing}"
            if word.isupper() or word == "...":
                return None
            command = command.commands[verbs[-1]]
    return None


def messages_of(source: Path) -> Iterator[str]:
    """The text literals of a module, its docstrings among them; an f-string's pieces with X for each value."""
    nodes: list[ast.AST] = [ast.parse(source.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        else:
            nodes.extend(ast.iter_child_nodes(node))


def test_the_scanner_sees_what_is_wrong() -> None:
    assert commands_in('eval "$(sparkray cluster env)"') == [["cluster", "env"]]
    assert commands_in("sparkray serve up \\\n  --port 1  # the model") == [["serve", "up", "--port", "1"]]
    assert complaint(["serve", "up", "--port", "1"]) is None
    assert complaint(["serve", "up|down|status"]) is None
    assert complaint(["NOUN", "VERB"]) is None
    assert complaint(["serve", "upp"]) is not None
    assert complaint(["serve", "up", "--ports", "1"]) is not None
    assert complaint(["sevre"]) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    assert [found for words in commands_in(code_of(page)) if (found := complaint(words))] == []


def test_the_commands_that_messages_name_exist() -> None:
    spans = ((source, span) for source in SOURCES for text in messages_of(source) for span in _SPAN.findall(text))
    found = [
        f"{source.relative_to(REPOSITORY)}: {wrong}"
        for source, span in spans
        for words in commands_in(span)
        if (wrong := complaint(words))
    ]
    assert found == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = _SPAN.sub("", _FENCE.sub("", text))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    named = _FILE.findall(code_of(page))
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert missing + [name for name in named if not (REPOSITORY / name).exists()] == []


def test_the_page_of_metis_lists_the_keys_of_a_request() -> None:
    page = (REPOSITORY / "docs/metis.md").read_text(encoding="utf-8")
    section = page.split("## Keys of a request")[1].split("## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(KEYS)
