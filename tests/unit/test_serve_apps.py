"""Serve's builders: Serve parses `args` only where the annotation is a class when it looks at it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from sparkray import config as settings
from sparkray.config.base import Settings, validate_settings
from sparkray.config.handoff import HandoffConfig
from sparkray.config.poc import PocServiceConfig

FOLDER = Path(__file__).resolve().parents[2] / "serve_apps"
KINDS: dict[str, type[Settings]] = {
    "llm": settings.ServeConfig,
    "search": settings.ServeConfig,
    "handoff": HandoffConfig,
    "poc": PocServiceConfig,
}


def test_every_builder_is_held() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_annotation_is_the_class_and_not_its_name(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert not futures, "it would turn the annotation into text, and Serve would hand over a plain dict"
    (build,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "build"]
    assert ast.unparse(build.args.args[0].annotation or ast.Name("none")) == KINDS[name].__name__


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_what_is_written_beside_them_is_accepted(path: Path) -> None:
    for application in yaml.safe_load(path.read_text())["applications"]:
        module, _, function = application["import_path"].partition(":")
        if module == "ray.serve.llm":
            from ray.serve.llm import LLMConfig

            assert function == "build_pd_openai_app"
            assert set(application["args"]) == {"prefill_config", "decode_config"}
            for side in application["args"].values():
                LLMConfig.model_validate(side)
            continue
        assert function == "build"
        validate_settings(KINDS[module.removeprefix("serve_apps.")], application["args"])
