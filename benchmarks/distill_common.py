"""What the benchmarks of distillation share: the folder they work in, and a student of a few million parameters."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparkray.config.distill import DistillConfig
from sparkray.distill.data.pack import Pack, read_pack
from sparkray.distill.run import make_pack

Measure = Callable[[argparse.Namespace, Path], dict[str, Any]]


def report_of(parser: argparse.ArgumentParser, measure: Measure, show: Callable[[dict[str, Any]], None]) -> None:
    """Add the options of all, measure in a folder, and print; the last line is one JSON object under `--json`."""
    parser.add_argument("--work", type=Path, help="Folder of what takes long to make, kept for the next call.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(arguments, arguments.work or Path(folder))
    show(report)
    if arguments.json:
        print(json.dumps(report))


def kept_pack(source: str, folder: Path, config: DistillConfig) -> Pack:
    """The pack of a folder, made if it is not there; `pack.json` is written last, so a half-made one is made again."""
    return read_pack(folder) if (folder / "pack.json").is_file() else make_pack(source, folder, config)


def small_shape(hidden_size: int) -> dict[str, int]:
    """Four layers of a width."""
    return {"hidden_size": hidden_size, "num_layers": 4, "num_heads": 4, "intermediate_size": 3 * hidden_size}
