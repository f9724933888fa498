"""Metric definitions, the adding up of a trace, and the dashboard and scrape config that name them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparkray.telemetry.metrics import (
    BUCKET_LABELS,
    DEFINITIONS,
    ENTROPY_BOUNDARIES_BITS,
    MEAN_ENTROPY,
    TOKENS,
    tally,
)

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
ALARMS = {1: "hedge", 2: "refuse"}


def test_a_trace_added_up_by_hand() -> None:
    nan = float("nan")
    found = tally([0.05, 0.3, nan, 1.2, 15.0, 0.3], [0, 1, 0, 1, 2, 0], [1, 0, 0, 1, 1, 0], ALARMS)
    assert found.num_tokens == 6
    by_label = dict(zip(BUCKET_LABELS, found.num_at_most, strict=True))
    assert by_label == {
        "0.05": 1, "0.1": 1, "0.25": 1, "0.5": 3, "1": 3, "1.5": 4, "2": 4, "3": 4, "4": 4, "6": 4, "8": 4, "12": 4,
        "+Inf": 5,
    }  # fmt: skip
    assert found.entropy_sum_bits == pytest.approx(0.05 + 0.3 + 1.2 + 15.0 + 0.3)
    assert found.mean_entropy_bits == pytest.approx(16.85 / 5)
    assert found.num_alarms == {"hedge": 2, "refuse": 1}
    assert found.num_boosts == 2, "a run of boosted tokens is one boost"


def test_an_empty_trace_has_no_mean() -> None:
    found = tally([], [], [], ALARMS)
    assert (found.num_tokens, found.num_alarms, found.num_boosts, found.mean_entropy_bits) == (0, {}, 0, None)


@given(st.lists(st.tuples(st.floats(0, 20), st.sampled_from([0, 1, 2]), st.booleans()), max_size=60))
def test_adding_up_equals_counting_one_by_one(tokens: list[tuple[float, int, bool]]) -> None:
    found = tally([t[0] for t in tokens], [t[1] for t in tokens], [t[2] for t in tokens], ALARMS)
    for label, count in zip(BUCKET_LABELS, found.num_at_most, strict=True):
        assert count == sum(entropy <= float(label) for entropy, _, _ in tokens)
    before = False
    num_boosts = 0
    for _, _, boosted in tokens:
        num_boosts += boosted and not before
        before = boosted
    assert found.num_boosts == num_boosts


def test_float32_columns_are_accepted() -> None:
    tokens_TF = np.array([[0.5, 1.0, 0.0], [2.5, 2.0, 1.0]], dtype=np.float32)
    found = tally(tokens_TF[:, 0], tokens_TF[:, 1], tokens_TF[:, 2], ALARMS)
    assert (found.entropy_sum_bits, found.num_alarms, found.num_boosts) == (3.0, {"hedge": 1, "refuse": 1}, 1)


def test_definitions_are_legal_and_distinct() -> None:
    assert len({definition.name for definition in DEFINITIONS}) == len(DEFINITIONS)
    for definition in DEFINITIONS:
        assert re.fullmatch(r"sparkray_[a-z0-9_]+", definition.name)
        assert not definition.name.endswith("_total"), "Ray adds it"
        assert bool(definition.boundaries) == (definition.kind == "histogram")
    assert list(ENTROPY_BOUNDARIES_BITS) == sorted(ENTROPY_BOUNDARIES_BITS)
    assert min(ENTROPY_BOUNDARIES_BITS) > 0, "Ray refuses others"
    assert TOKENS.exposed_names == ("ray_sparkray_metis_tokens_total",)
    assert MEAN_ENTROPY.exposed_names[0] == "ray_sparkray_metis_mean_entropy_bits_bucket"


def _expressions() -> list[str]:
    dashboard = json.loads((DASHBOARDS / "metis.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_what_is_exposed_and_for_all_of_it() -> None:
    named = {name for expression in _expressions() for name in re.findall(r"ray_sparkray_\w+", expression)}
    exposed = {name for definition in DEFINITIONS for name in definition.exposed_names}
    assert named <= exposed
    for definition in DEFINITIONS:
        assert named & set(definition.exposed_names), f"no panel shows {definition.name}"


def test_the_dashboard_uses_labels_that_its_metrics_carry() -> None:
    tags = {name: definition.tags for definition in DEFINITIONS for name in definition.exposed_names}
    # Every sample of Ray carries these; a histogram's buckets carry `le`.
    common = {"WorkerId", "NodeAddress", "SessionName", "le"}
    for expression in _expressions():
        names = re.findall(r"ray_sparkray_\w+", expression)
        for group in re.findall(r"by \(([^)]*)\)", expression):
            for label in group.replace(" ", "").split(","):
                assert any(label in tags[name] for name in names) or label in common, expression


def test_panels_do_not_overlap_and_have_a_source() -> None:
    dashboard = json.loads((DASHBOARDS / "metis.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert box["x"] + box["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_prometheus_finds_every_node() -> None:
    config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    # Ray's dashboard writes this file and keeps it up to date with the nodes of the cluster.
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
