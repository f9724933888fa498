"""A student over two nodes, taught by a host on the first: what breaks on the way changes no loss.

The host is a double, so that the rows of two runs are the same to the bit; the nodes, the workers and what is done to
them are real.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, models

from sparkray.cluster.processes import marked
from sparkray.config.base import validate_settings
from sparkray.config.distill import DistillConfig, PackConfig, TrainJobConfig
from sparkray.distill.alignment.fingerprint import tokenizer_sha256
from sparkray.distill.data.pack import pack_documents, write_pack
from sparkray.distill.data.sources import read_documents
from sparkray.distill.run import train_causal
from sparkray.errors import UsageError
from tests.ray.conftest import NUM_CPUS_PER_NODE, RayCluster
from tests.unit.teacher_server import VOCAB_SIZE, Fault, TeacherServer, serve_teacher

CHECKPOINT_STEPS, BATCH = 5, 4
DOWN_SECONDS, PATIENCE_SECONDS = 30.0, 600.0
END = VOCAB_SIZE - 1

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Classroom:
    """A pack, the host that scores it, and the host's tokenizer."""

    folder: Path
    host: TeacherServer

    def settings(self, num_steps: int, cache: Path) -> DistillConfig:
        return validate_settings(
            DistillConfig,
            {
                "teacher": {
                    "kind": "api",
                    "base_url": self.host.url,
                    "model": "m",
                    "tokenizer": str(self.folder / "tokenizer"),
                    "max_model_tokens": 128,
                    "overlap_tokens": 8,
                },
                "client": {"top_logprobs": 8, "reduced_top_logprobs": 4, "max_backoff_seconds": 2},
                "cache": {"path": str(cache)},
                "loss": {"target": "tail_bucket"},
                "student": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16},
                "train": {
                    "num_steps": num_steps,
                    "batch_sequences": BATCH,
                    "micro_batch_sequences": 2,
                    "checkpoint_steps": CHECKPOINT_STEPS,
                    "device": "cpu",
                },
            },
        )

    def alone(self, out: Path, num_steps: int) -> dict[int, float]:
        """The losses of one process without a cluster."""
        config = self.settings(num_steps, out.with_suffix(".sqlite"))
        train_causal(self.folder / "pack", out, config, store_folder=None, live=True)
        return {row["step"]: row["loss"] for row in steps(out)}

    def on_cluster(self, out: Path, num_steps: int, **workers: Any) -> dict[str, Any]:
        from sparkray.distill.training.ray_run import train_on_cluster

        job = validate_settings(
            TrainJobConfig,
            {
                "pack": str(self.folder / "pack"),
                "live": True,
                "out": str(out),
                "distill": self.settings(num_steps, out.with_suffix(".sqlite")),
                "workers": {"num_workers": 2, "spread": True, "accelerator": "cpu", **workers},
            },
        )
        return train_on_cluster(job)


@pytest.fixture(scope="module")
def classroom(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classroom]:
    folder = tmp_path_factory.mktemp("classroom")
    letters = {chr(ord("0") + number): number for number in range(END)} | {"<|endoftext|>": END}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="0"))
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    pack = pack_documents(
        read_documents("python-docs"),
        lambda text: [byte % END for byte in text.encode()],
        PackConfig(sequence_tokens=32, max_sequences=2000),
        end_id=END,
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
    )
    write_pack(pack, folder / "pack")
    with serve_teacher(cluster.network.head_ip) as host:
        yield Classroom(folder, host)


def steps(out: Path) -> list[dict[str, Any]]:
    """The steps in the order in which they were made, those that were made again included."""
    path = out / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if "loss" in row]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def ranks(cluster: RayCluster) -> list[psutil.Process]:
    return [process for process in marked(cluster.session.mark) if "RayTrainWorker" in " ".join(process.cmdline())]


def visible_checkpoints(out: Path) -> set[int]:
    """The steps whose state lies in the run's folder as a whole file."""
    return {int(path.parent.name.removeprefix("step-")) for path in out.glob("checkpoint_*/step-*/state.pt")}


def beginnings(rows: list[dict[str, Any]]) -> list[int]:
    """After how many steps each start of the workers began."""
    first = [rows[0]["step"] - 1]
    return first + [
        right["step"] - 1
        for left, right in pairwise(rows)
        if right["step"] <= left["step"] or right["num_workers"] != left["num_workers"]
    ]


def test_a_killed_rank_and_a_teacher_that_is_down_change_no_bit(
    cluster: RayCluster, ray_connection: None, classroom: Classroom, tmp_path: Path
) -> None:
    num_steps = 60
    undisturbed = classroom.on_cluster(tmp_path / "two", num_steps)
    assert (undisturbed["num_steps"], undisturbed["num_steps_done_again"]) == (num_steps, 0)
    two = {row["step"]: row["loss"] for row in steps(tmp_path / "two")}
    alone = classroom.alone(tmp_path / "alone", num_steps)
    assert list(alone) == list(two) == list(range(1, num_steps + 1))
    assert max(abs(alone[step] - two[step]) for step in alone) < 1e-4

    out, host = tmp_path / "disturbed", classroom.host

    def disturb() -> tuple[int, int, set[int]]:
        try:
            wait_for(lambda: len(steps(out)) >= 8, "eight steps")
            host.always = Fault(status=0)
            time.sleep(DOWN_SECONDS / 2)
            while_down = len(steps(out))
            time.sleep(DOWN_SECONDS / 2)
            after_down = len(steps(out))
            host.always = None
            wait_for(lambda: len(steps(out)) >= 2 * CHECKPOINT_STEPS + 12, "steps after the teacher came back")
            ranks(cluster)[-1].send_signal(signal.SIGKILL)
            killed_at = len(steps(out))
            wait_for(lambda: len(steps(out)) > killed_at + 1, "a step after the kill")
            return while_down, after_down, visible_checkpoints(out)
        finally:
            host.always, host.latency_seconds = None, 0.0

    host.latency_seconds = 0.3
    with ThreadPoolExecutor(1) as pool:
        disturbance = pool.submit(disturb)
        disturbed = classroom.on_cluster(out, num_steps)
        while_down, after_down, visible = disturbance.result()
    # What had been asked for ahead was learnt, then the student waited.
    assert while_down == after_down < num_steps
    rows = steps(out)
    assert disturbed["num_steps_done_again"] == len(rows) - num_steps > 0
    assert all(row["num_workers"] == 2 for row in rows)
    # A step that was made twice cost the same twice.
    assert [row["loss"] for row in rows] == [two[row["step"]] for row in rows]
    first, *again = beginnings(rows)
    assert first == 0
    assert again
    assert set(again) <= visible


def test_a_node_leaves_and_comes_back(
    cluster: RayCluster, ray_connection: None, classroom: Classroom, tmp_path: Path
) -> None:
    num_steps, out, host = 300, tmp_path / "elastic", classroom.host
    alone = classroom.alone(tmp_path / "alone", num_steps)
    with pytest.raises(UsageError, match="two would be put there"):
        classroom.on_cluster(tmp_path / "crowded", num_steps, min_workers=1, cpus_per_worker=1)

    def disturb() -> set[int]:
        try:
            wait_for(lambda: len(steps(out)) >= 2 * CHECKPOINT_STEPS + 2, "steps of two")
            cluster.kill_second_node()
            host.latency_seconds = 1.5
            wait_for(lambda: steps(out)[-1]["num_workers"] == 1, "a step of one")
            visible = visible_checkpoints(out)
            cluster.start_second_node()
            wait_for(lambda: steps(out)[-1]["num_workers"] == 2, "a step of two again")
            return visible | visible_checkpoints(out)
        finally:
            host.latency_seconds = 0.0

    host.latency_seconds = 0.3
    with ThreadPoolExecutor(1) as pool:
        disturbance = pool.submit(disturb)
        summary = classroom.on_cluster(
            out, num_steps, min_workers=1, cpus_per_worker=NUM_CPUS_PER_NODE / 2 + 1, resize_seconds=5
        )
        visible = disturbance.result()
    assert summary["num_steps"] == num_steps
    rows = steps(out)
    numbers = [row["num_workers"] for row in rows]
    assert [right for left, right in pairwise([0, *numbers]) if left != right] == [2, 1, 2]
    assert {row["step"] for row in rows} == set(range(1, num_steps + 1))
    assert max(abs(row["loss"] - alone[row["step"]]) for row in rows) < 1e-4
    assert set(beginnings(rows)) <= visible | {0}
