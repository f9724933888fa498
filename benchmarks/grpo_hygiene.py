"""What the cognitive reward does alone, and beside a verifiable one: the policy's entropy and the held-out accuracy.

    python benchmarks/grpo_hygiene.py --json

The same task, seeds and steps under three rewards: verifiable, cognitive, and both (the cognitive one as shaping, at
0.1). A model that is sure of every token has a perfect calibration, whatever it says: `cognitive.collapsed` tells
whether the entropy of the policy fell by more than half in the run, as the run's own summary reports it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from grpo_learns import CANDIDATES, ROOT, reasoning, run_config, two_nodes

VERIFIABLE = ({"kind": "reasoning_gym"},)
REWARDS: dict[str, dict[str, Any]] = {
    "verifiable": {"terms": VERIFIABLE},
    "cognitive": {"cognitive_weight": 1.0},
    "both": {"terms": VERIFIABLE, "cognitive_weight": 0.1},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--task", default="chain_sum", choices=[one.name for one in CANDIDATES])
    parser.add_argument("--held-out", type=int, default=40)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    from sparkray.grpo.ray_run import rollout_engines, train_run
    from sparkray.serving.app import engine_kwargs

    candidate = next(one for one in CANDIDATES if one.name == arguments.task)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in REWARDS}
    with tempfile.TemporaryDirectory(prefix="grpo-hygiene-") as folder, two_nodes(4):
        values = reasoning(Path(folder), candidate, arguments.steps, arguments.held_out)
        with rollout_engines(run_config(values, {}), engine_kwargs) as engines:
            for seed in range(arguments.seeds):
                for name, reward in REWARDS.items():
                    # Held-out answers have no trace to judge, so a run without a verifiable reward has no accuracy.
                    held_out = values["eval_dataset"] if "terms" in reward else None
                    changes = {"reward": reward, "seed": seed, "run_name": f"{name}-{seed}", "eval_dataset": held_out}
                    summary = train_run(run_config(values, changes), engine_arguments=engine_kwargs, engines=engines)
                    found[name].append(summary)
                    line = f"{name} seed {seed}: entropy x {summary['entropy_ratio']:.2f}, {summary['eval_after']}"
                    print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    result = {
        name: {
            "entropy_ratio": statistics.median(one["entropy_ratio"] for one in runs),
            "collapsed": all(one["entropy_collapsed"] for one in runs),
            "reward_first": [one["reward_first"] for one in runs],
            "reward_last": [one["reward_last"] for one in runs],
            "eval_before": [one["eval_before"] for one in runs],
            "eval_after": [one["eval_after"] for one in runs],
        }
        for name, runs in found.items()
    }
    print(json.dumps({"task": arguments.task, "steps": arguments.steps, **result}))


if __name__ == "__main__":
    main()
