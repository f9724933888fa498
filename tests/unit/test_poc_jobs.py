"""What the verbs and jobs show: rates, tables, servers compared, the cost model, devices and the sweep."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sparkray.cli.main import app
from sparkray.config.base import load_settings
from sparkray.config.poc import BIG, PRESETS, TINY, V1, PocConfig, PocServiceConfig, WeightsConfig, preset
from sparkray.config.poc_jobs import PocCrossCheckConfig, PocGenerateConfig, PocNonceRateConfig
from sparkray.errors import UnavailableError, UsageError
from sparkray.poc import measure
from sparkray.poc.compare import ServerResult, cross_check
from sparkray.poc.devices import resolve_device
from sparkray.poc.groups import GroupShape, gpu_shapes
from sparkray.poc.live_table import Rates, build_table
from sparkray.poc.local import generate, measure_rate, verify_hardened
from sparkray.poc.planner import MACHINES, Goal, Machine, peak_tflops, predict, search
from sparkray.poc.proofs import ProofBatch
from sparkray.poc.ray_metrics import DEFINITIONS, FleetMetrics
from sparkray.poc.replay import replay
from sparkray.poc.service.client import read_status

ROOT = Path(__file__).parents[2]
LOCAL = PocConfig(
    params=TINY, block_hash="0x00", public_key="0x00", r_target=1.4, device="cpu", batch_size=16, num_prep_threads=1
)
HARDENED = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 128, "seq_len": 8}
SMALL_HARDENED = LOCAL.model_copy(
    update={"mode": "hardened", "params": TINY.model_copy(update={**HARDENED, "multiple_of": 64})}
)


def test_devices_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UnavailableError, match="CUDA devices are there"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")


def test_gpus_of_several_nodes_make_groups_within_each() -> None:
    shapes = gpu_shapes([[80.0, 80.0], [], [24.0, 24.0, 24.0]], lambda count: 40.0 / count, 2.0)
    assert [shape.num_gpus for shape in shapes] == [1, 1, 2]
    assert shapes[2].bundles == [{"CPU": 2.0, "GPU": 2.0}]
    assert GroupShape(0, 1.5).bundles == [{"CPU": 1.5}]
    with pytest.raises(UnavailableError, match=r"40.0 GiB in 1, 20.0 GiB in 2, .* \[\[19.0, 30.0\], \[16.0\]\]"):
        gpu_shapes([[19.0, 30.0], [16.0]], lambda count: 40.0 / count, 1.0)


def test_nodes_share_a_group_where_that_is_asked_for() -> None:
    def needed(count: int) -> float:
        return 200.0 / count

    one_gb10_each = [[119.0]] * 5
    with pytest.raises(UnavailableError, match=r"200\.0 GiB in 1"):
        gpu_shapes(one_gb10_each, needed, 1.0)
    shapes = gpu_shapes(one_gb10_each, needed, 3.0, num_nodes=2)
    # The fifth has no partner.
    assert [shape.bundles for shape in shapes] == [[{"CPU": 3.0, "GPU": 1.0}] * 2] * 2
    # Blocks are shared evenly: two devices of 50 of the one node make two of the other work, though one held half.
    assert [shape.num_gpus for shape in gpu_shapes([[50.0] * 4, [100.0] * 3], needed, 1.0, 2)] == [2]
    with pytest.raises(UnavailableError, match="of each of 3 nodes"):
        gpu_shapes([[119.0], [119.0]], needed, 1.0, num_nodes=3)


def test_generate_keeps_the_valid_ones_of_this_node() -> None:
    config = LOCAL.model_copy(update={"node_id": 1, "node_count": 3, "block_height": 9})
    seen: list[int] = []
    done = generate(config, 50, seen.append)
    nonces = [1 + 3 * index for index in range(50)]
    expected = replay("0x00", "0x00", nonces, TINY, WeightsConfig())
    assert done.batch.nonces == tuple(n for n, d in zip(nonces, expected, strict=True) if d < 1.4)
    assert done.batch.dist == pytest.approx(tuple(d for d in expected if d < 1.4), abs=1e-6)
    assert (done.batch.node_id, done.batch.block_height, done.digests) == (1, 9, None)
    assert (done.monitor.num_total, done.monitor.num_valid) == (50, len(done.batch))
    assert seen == [16, 32, 48, 50]


def test_hardened_proofs_carry_digests_that_verify_to_the_bit() -> None:
    done = generate(SMALL_HARDENED, 24)
    assert done.digests is not None
    assert len(done.digests) == len(done.batch) > 0
    assert all(verify_hardened(SMALL_HARDENED, done.batch, done.digests))
    forged = (math.nextafter(done.batch.dist[0], 0.0), *done.batch.dist[1:])
    wrong = ProofBatch(*done.batch.identity, done.batch.nonces, forged, 0)
    assert verify_hardened(SMALL_HARDENED, wrong, done.digests) == [False] + [True] * (len(wrong) - 1)


def test_a_rate_counts_what_it_computed() -> None:
    measured = measure_rate(LOCAL, 0.2)
    assert measured.device == "cpu"
    assert measured.batch_size == 16
    assert measured.num_nonces % 16 == 0
    assert measured.num_nonces > 0
    assert measured.valid_per_minute / measured.raw_per_minute == pytest.approx(
        sum(replay("0x00", "0x00", range(16, 16 + measured.num_nonces), TINY, WeightsConfig()) < 1.4)
        / measured.num_nonces
    )
    assert measured.model_tflops == pytest.approx(measured.raw_per_minute / 60 * TINY.flop_per_nonce / 1e12)


def test_the_cost_model_by_hand() -> None:
    machine = Machine("m", 100.0, 8.0, utilisation=0.5, normals_per_second=1e8, prep_threads=4, copy_gb_per_second=10.0)
    found = predict(V1, WeightsConfig(), machine, r_target=1.4013564660458173)
    # 2 * (32 * 128 * (4 * 1024^2 + 3 * 1024 * 28672 + 2 * 1024 * 128) + 8196 * 1024) operations at 50 TFLOP/s.
    flop = 2 * (32 * 128 * (4 * 1024**2 + 3 * 1024 * 28672 + 2 * 1024 * 128) + 8196 * 1024)
    assert found.raw_per_hour == pytest.approx(3600 * 50e12 / flop)
    assert found.valid_per_hour / found.raw_per_hour == pytest.approx(0.0506, abs=2e-4)
    assert found.nominal_gb == pytest.approx(5.939, abs=1e-3)
    # 148.5 million normals at 100 million a second, 0.297 GB at 10 GB/s, and 6 s.
    assert found.start_seconds == pytest.approx(6 + 1.485 + 0.0297, abs=1e-3)
    # One thread that draws a tenth as fast as the model computes decides instead.
    slow = Machine("m", 1e6, 8.0, utilisation=1.0, normals_per_second=1e6, prep_threads=2)
    assert predict(V1, WeightsConfig(), slow).raw_per_hour == pytest.approx(3600 * 2 * 1e6 / (128 * 1024 + 8196))


def test_the_big_preset_is_what_the_search_finds_and_meets_its_goal() -> None:
    gb10 = next(machine for machine in MACHINES if machine.name == "GB10")
    best = search(gb10)[0]
    assert (best.params, best.weights) == PRESETS["BIG"]
    assert best.params == BIG
    for machine in MACHINES:
        found = predict(*PRESETS["BIG"], machine)
        assert 30 <= found.nominal_gb <= 40
        if found.fits:
            assert found.start_seconds < 60
            assert found.valid_per_hour >= 500
    assert best.start_seconds * Goal().margin < 60
    assert search(gb10, Goal(min_gb=1000, max_gb=1001)) == []
    with pytest.raises(UsageError, match="TINY exist"):
        preset("HUGE")


def test_the_share_of_peak_is_what_makes_the_model_predict_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_best_seconds", lambda work: 0.01)  # 2 * 1024^3 operations in 10 ms
    monkeypatch.setattr(measure, "_rate", lambda params, device: 5.0)
    machine = measure.measure_machine("cpu")
    assert machine.peak_tflops == pytest.approx(0.2147, abs=1e-4)
    assert machine.normals_per_second > 0
    assert predict(measure.CALIBRATED_ON, WeightsConfig(), machine).raw_per_hour == pytest.approx(5.0 * 3600)
    monkeypatch.setattr(measure, "_rate", lambda params, device: 2.0)
    checked = measure.check_cost_model(machine)
    # The rate goes down as the operations of a nonce go up.
    work = measure.CALIBRATED_ON.flop_per_nonce / measure.TRIED_ON.flop_per_nonce
    assert checked["predicted"] == pytest.approx(5.0 * work)
    assert checked["predicted_over_measured"] == pytest.approx(2.5 * work)


def server(name: str, dist: np.ndarray) -> ServerResult:
    return ServerResult(name, "cpu", ((),), 1.0, 60.0, 8, 0.5, True, tuple(dist.tolist()))


def test_servers_that_differ_are_named_with_the_nonces_that_they_judge_differently() -> None:
    one = np.linspace(1.3, 1.5, 100)
    noisy = one + np.where(np.arange(100) % 2, 1e-4, -1e-4)
    found = cross_check([server("a", one), server("b", one), server("c", noisy)], range(500, 600), 1.39995, 8196)
    same, apart, _ = found["pairs"]
    assert same["same_bits"]
    assert same["largest_difference"] == 0
    assert same["changed_verdicts"] == []
    assert apart["servers"] == ["a", "c"]
    assert apart["noise_sd"] == pytest.approx(1e-4)
    # 1.3 + 49 * 0.2 / 99 = 1.39899, + 50 * ... = 1.40101: neither is within 1e-4 of the target.
    assert apart["changed_verdicts"] == []
    near = one.copy()
    near[49], noisy[49] = 1.39991, 1.39999
    changed = cross_check([server("a", near), server("c", noisy)], range(500, 600), 1.39995, 8196)
    assert changed["pairs"][0]["changed_verdicts"] == [549]
    assert not changed["same_verdicts"]
    assert found["same_verdicts"]
    assert found["raw_per_minute"] == 180.0


def test_rates_of_groups_between_two_looks() -> None:
    rates = Rates()
    assert rates.update([10, 20], 1.0) == [0.0, 0.0]
    assert rates.update([13, 20], 3.0) == [90.0, 0.0]
    assert rates.update([13], 4.0) == [0.0]


def test_the_table_shows_every_group_and_the_alarm() -> None:
    status = {
        "num_loaded": 1, "num_groups": 2, "generation": 3, "num_recorded": 1234, "num_valid": 60, "share_z_score": 6.1,
        "share_alarm": True, "num_restarts": 1, "num_batches_waiting": 4, "cursors": [1000, 234],
        "last_failures": {"1": "it was killed"},
    }  # fmt: skip
    output = io.StringIO()
    Console(file=output, width=120).print(build_table(status, [600.0, 0.0]))
    text = output.getvalue()
    for part in ("1 of 2 groups", "1,000", "600", "it was killed", "ALARM", "recorded 1,234"):
        assert part in text


def test_metrics_are_counts_since_the_last_look_and_rates_a_minute() -> None:
    seen: list[tuple[str, float]] = []
    clock = iter([0.0, 30.0])
    metrics = FleetMetrics(
        TINY, 2.0, lambda definition, value: seen.append((definition.name, value)), lambda: next(clock)
    )
    summary = {
        "num_recorded": 100, "num_valid": 10, "num_loaded": 2, "num_restarts": 0, "num_batches_waiting": 3,
        "num_chunks_waiting": 7, "share_z_score": 0.5,
    }  # fmt: skip
    metrics.publish(summary, 4)
    assert ("sparkray_poc_unsent_callbacks", 4) in seen
    assert not any(name.endswith("minute") for name, _ in seen)
    seen.clear()
    metrics.publish({**summary, "num_recorded": 400, "num_valid": 40}, 0)
    values = dict(seen)
    assert (values["sparkray_poc_nonces"], values["sparkray_poc_valid_nonces"]) == (300, 30)
    assert (values["sparkray_poc_raw_per_minute"], values["sparkray_poc_valid_per_minute"]) == (600, 60)
    assert values["sparkray_poc_model_tflops"] == pytest.approx(10 * TINY.flop_per_nonce / 1e12)
    assert values["sparkray_poc_mfu"] == values["sparkray_poc_model_tflops"] / 2.0
    assert set(values) == {definition.name for definition in DEFINITIONS}


def test_peaks_are_known_by_the_names_of_devices() -> None:
    assert peak_tflops(["H100", "NVIDIA H100 80GB HBM3"]) == 2 * 989.0
    assert peak_tflops(["NVIDIA GeForce RTX 4090"]) == peak_tflops(["RTX-4090"]) == 165.0
    assert peak_tflops(["H100", "Radeon"]) is peak_tflops([]) is None


def test_watching_a_service_that_is_not_there_says_what_to_do() -> None:
    with pytest.raises(UnavailableError, match="serve deploy"):
        read_status("http://127.0.0.1:9")


@pytest.mark.parametrize("kind", [PocNonceRateConfig, PocCrossCheckConfig])
def test_jobs_run_without_any_settings(kind: type[PocNonceRateConfig] | type[PocCrossCheckConfig]) -> None:
    assert kind().poc.params == V1
    # Nor do other settings take the seeds away.
    some = load_settings(kind, overrides=["poc.device=cpu"]).poc
    assert (some.block_hash, some.public_key, some.device) == (kind().poc.block_hash, kind().poc.public_key, "cpu")


@pytest.mark.parametrize("text", ["0xabc123", "0012", "1234", "12_3"])
def test_a_hash_that_reads_like_a_number_stays_as_it_was_written(text: str) -> None:
    names = [f"block_hash={text}", f"public_key={text}", "node_id=1", "node_count=2"]
    config = load_settings(PocConfig, overrides=names)
    assert (config.block_hash, config.public_key, config.node_id) == (text, text, 1)


def test_shipped_settings_are_read() -> None:
    generate_config = load_settings(PocGenerateConfig, [ROOT / "configs/poc/generate.toml"])
    assert generate_config.poc.params == V1
    named = {"block_hash": "0x1", "public_key": "k"}
    assert load_settings(PocConfig, [ROOT / "configs/poc/v1.toml"], values=named).params == V1
    assert load_settings(PocConfig, [ROOT / "configs/poc/hardened.toml"], values=named).mode == "hardened"
    import yaml

    served = yaml.safe_load((ROOT / "serve_apps/poc.yaml").read_text())["applications"][0]["args"]
    assert PocServiceConfig(**served) == PocServiceConfig()
    with pytest.raises(UsageError, match="compatible mode"):
        load_settings(PocGenerateConfig, [ROOT / "configs/poc/generate.toml"], ["poc.mode=hardened"])


def run_json(*arguments: str) -> tuple[int, dict[str, object]]:
    done = CliRunner().invoke(app, ["poc", *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout.strip().splitlines()[-1])


def test_the_verbs_work_together(tmp_path: Path) -> None:
    out = tmp_path / "proof.json"
    common = ("--preset", "TINY", "--r-target", "1.4", "--device", "cpu", "--batch-size", "32")
    code, made = run_json(
        "generate", "--count", "64", "--block-hash", "0x1", "--public-key", "k", "--out", str(out), *common
    )
    assert (code, made["num_nonces"]) == (0, 64)
    code, judged = run_json("validate", str(out), *common)
    assert (code, judged["is_fraud"], judged["n_invalid"]) == (0, False, 0)
    assert judged["num_computed"] == made["num_valid"]
    body = json.loads(out.read_text())
    out.write_text(json.dumps({**body, "dist": [value - 0.01 for value in body["dist"]]}))
    code, judged = run_json("validate", str(out), *common)
    assert (code, judged["is_fraud"]) == (4, True)
    code, planned = run_json("plan", "--top", "1")
    assert code == 0
    assert [row["preset"] for row in planned["rows"]] == [*PRESETS, ""]  # type: ignore[index,union-attr]
    code, rate = run_json("rate", "--seconds", "0.1", *common)
    assert (code, rate["batch_size"]) == (0, 32)
