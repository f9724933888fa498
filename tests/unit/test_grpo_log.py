"""The log of a run, its means by hand, the page it ends with, and the shipped settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sparkray.cli.main import app
from sparkray.config.base import load_settings
from sparkray.config.grpo import GrpoConfig
from sparkray.errors import NotFoundError, UsageError
from sparkray.grpo.curves import entropy_collapse, write_report
from sparkray.grpo.metrics_log import MetricsLog, means, read_log, reward_matrix, reward_sums
from sparkray.grpo.progress import step_line
from sparkray.grpo.rewards import Score
from sparkray.grpo.rollouts import Rollout, RolloutGroup
from sparkray.grpo.run_folder import lasting_folder, with_own_data

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "grpo").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_training_file_is_accepted(path: Path) -> None:
    load_settings(GrpoConfig, [path])


def test_the_embedded_settings_come_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["train", "grpo", "--config", "configs/grpo/embedded.toml", "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["num_rows"] == 68 and told["num_steps"] == 20
    train, held_out = (
        {json.loads(line)["word"] for line in (ROOT / f"configs/grpo/data/animals_{split}.jsonl").open()}
        for split in ("train", "held_out")
    )
    assert len(held_out) == 29 and not train & held_out


def rollout(num_tokens: int, reason: Any = "stop") -> Rollout:
    return Rollout(tuple(range(num_tokens)), "", np.zeros(num_tokens, np.float32), reason, 0)


def test_means_by_hand() -> None:
    groups = [RolloutGroup(0, (1,), (rollout(2), rollout(4, "length")))]
    scores = [[Score(1.0, {"exact": 1.0}), Score(math.nan, failure="it raised")]]
    assert math.isnan(reward_matrix(scores)[0, 1])
    sums = reward_sums(groups, scores)
    other = reward_sums(groups, [[Score(0.0, {"exact": 0.0}), Score(0.5, {"exact": 0.5})]])
    found = means({name: sums.get(name, 0.0) + other.get(name, 0.0) for name in sums | other})
    assert found["reward"] == pytest.approx(0.5)
    assert found["reward_std"] == pytest.approx(math.sqrt((1 + 0 + 0.25) / 3 - 0.25))
    assert found["reward_failed"] == 0.25
    assert found["completion_tokens"] == 3.0
    assert found["truncated"] == 0.5
    assert found["reward/exact"] == pytest.approx(0.5)
    assert "engine_entropy_bits" not in found


def test_a_run_that_goes_on_takes_back_repeated_steps(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, next_step=0)
    for step in range(5):
        log.add({"step": step, "reward": float(step), "kl": math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # killed while writing
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1, 2, 3, 4]
    assert read_log(tmp_path)[0]["kl"] is None
    again = MetricsLog(tmp_path, next_step=3)
    again.add({"step": 3, "reward": 30.0})
    assert [row["reward"] for row in read_log(tmp_path)] == [0.0, 1.0, 2.0, 30.0]


def test_entropy_collapse_is_told() -> None:
    falling = [{"step": step, "entropy_nats": 2.0 * 0.7**step, "num_tokens": 5} for step in range(10)]
    steady = [{"step": step, "entropy_nats": 2.0 - 0.01 * step, "num_tokens": 5} for step in range(10)]
    assert entropy_collapse(falling)["entropy_collapsed"] is True
    told = entropy_collapse(steady)
    assert told["entropy_collapsed"] is False
    assert told["entropy_first"] == pytest.approx(1.995) and told["entropy_last"] == pytest.approx(1.915)
    assert entropy_collapse([])["entropy_collapsed"] is False


def test_the_report_is_one_page(tmp_path: Path) -> None:
    rows = [{"step": step, "reward": step / 4, "entropy_nats": 1.0, "gap_mean": 1e-6} for step in range(4)]
    settings = {"run_name": "a<b", "loss": {"name": "dapo"}}
    page = write_report(rows, settings, {"num_steps": 4}, tmp_path).read_text()
    assert "a&lt;b" in page and "data:image/png;base64," in page and "http" not in page
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_step_as_a_line() -> None:
    row = {"step": 4, "reward": 0.5, "gap_max": 2e-6, "eval_reward": None, "canary_alarm": "it grew"}
    assert step_line(row, 40) == "step 5/40  reward 0.500  gap 2.0e-06  ALARM: it grew"


def test_a_run_keeps_to_the_rows_it_began_with(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a"}\n')
    config = GrpoConfig(dataset=str(source), output_dir="o")
    own = Path(with_own_data(config, tmp_path / "run").dataset)
    assert own.read_text() == source.read_text() and (tmp_path / "run") in own.parents
    assert with_own_data(config, tmp_path / "run").dataset == str(own)
    source.write_text('{"prompt": "b"}\n')
    with pytest.raises(UsageError, match="run on other rows"):
        with_own_data(config, tmp_path / "run")
    with pytest.raises(NotFoundError, match="no such file"):
        with_own_data(GrpoConfig(dataset=str(tmp_path / "none.jsonl"), output_dir="o"), tmp_path / "other")


def test_a_folder_that_ray_deletes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = tmp_path / "working_dir_files" / "_ray_pkg_1"
    unpacked.mkdir(parents=True)
    monkeypatch.chdir(unpacked)
    with pytest.raises(UsageError, match="Ray deletes"):
        lasting_folder("runs")
    assert lasting_folder(str(tmp_path)) == tmp_path
