"""What the cognitive reward does alone, and beside a verifiable one: the policy's entropy and the held-out score.

    python benchmarks/grpo_hygiene.py --json

The task is free text: a sentence that says a given word, in words that are not said over and over; `sentence_reward`
checks it. The same prompts, seeds and steps under three rewards: verifiable, cognitive, and both (the cognitive one as
shaping, at 0.1). A model that is sure of every token has a perfect calibration, whatever it says: `cognitive.collapsed`
tells whether the entropy of the policy fell by more than half in the run, as the run's own summary reports it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from grpo_learns import ROOT, common, finished_run, run_config, two_nodes, write_rows

VERIFIABLE = ({"kind": "python", "target": "grpo_hygiene:sentence_reward"},)
REWARDS: dict[str, dict[str, Any]] = {
    "verifiable": {"terms": VERIFIABLE},
    "cognitive": {"cognitive_weight": 1.0},
    "both": {"terms": VERIFIABLE, "cognitive_weight": 0.1},
}
WORDS = re.findall(
    r"\w+",
    "apple bread chair river house train music paper stone table water glass light money night road book door fire "
    "hand milk moon rain ring salt ship shoe snow song star tree wall wind wood bird boat bone cake coat corn",
)
HELD_OUT_WORDS = re.findall(r"\w+", "beach clock cloud field flower garden horse island kitchen letter market mountain")
EXAMPLES = "Word: cat\nSentence: The cat slept on the warm roof all day.\n\nWord: bus\nSentence: We missed the bus.\n\n"


def sentence_reward(completions: list[str], word: list[str], **_: Any) -> list[float]:
    """1 for a sentence of five words or more that says its word and says few words twice; parts of it otherwise.

    Half is for the word, half for the share of words that are new, which a text that repeats itself has little of.
    """
    rewards = []
    for text, wanted in zip(completions, word, strict=True):
        said = re.findall(r"[a-z']+", text.lower())
        fresh = len(set(said)) / len(said) if len(said) >= 5 else 0.0
        rewards.append(0.5 * (wanted in said) + 0.5 * (fresh >= 0.8))
    return rewards


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """Settings of the task, whose prompts are written to `folder`."""

    def rows(words: list[str]) -> list[dict[str, str]]:
        return [{"prompt": f"{EXAMPLES}Word: {word}\nSentence:", "word": word} for word in words]

    return {
        **common(folder),
        "dataset": write_rows(folder / "sentences-train.jsonl", rows(WORDS)),
        "eval_dataset": write_rows(folder / "sentences-held-out.jsonl", rows(HELD_OUT_WORDS)),
        "prompts_per_step": 8,
        "max_steps": steps,
        "max_prompt_tokens": 64,
        "max_completion_tokens": 16,
        "stop": ("\n",),
        "learning_rate": 5e-4,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with those that are here")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    # The actors that score import the reward from this folder.
    paths = (str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    from sparkray.grpo.ray_run import rollout_engines
    from sparkray.serving.app import engine_kwargs

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in REWARDS}
    with tempfile.TemporaryDirectory(prefix="grpo-hygiene-") as temporary, two_nodes(4):
        folder = arguments.folder.absolute() if arguments.folder is not None else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        values = settings(folder, arguments.steps)
        with rollout_engines(run_config(values, {}), engine_kwargs) as engines:
            for seed in range(arguments.seeds):
                for name, reward in REWARDS.items():
                    # Held-out answers have no trace to judge, so a run without a verifiable reward has no score.
                    held_out = values["eval_dataset"] if "terms" in reward else None
                    run_name = f"{name}-{seed}-of-{arguments.steps}-steps"
                    changes = {"reward": reward, "seed": seed, "run_name": run_name, "eval_dataset": held_out}
                    summary = finished_run(run_config(values, changes), engines)
                    found[name].append(summary)
                    line = f"{name} seed {seed}: entropy x {summary['entropy_ratio']:.2f}, {summary['eval_after']}"
                    print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    result = {
        name: {
            "entropy_ratio": statistics.median(one["entropy_ratio"] for one in runs),
            "entropy_first": [one["entropy_first"] for one in runs],
            "entropy_last": [one["entropy_last"] for one in runs],
            "collapsed": all(one["entropy_collapsed"] for one in runs),
            "reward_first": [one["reward_first"] for one in runs],
            "reward_last": [one["reward_last"] for one in runs],
            "eval_before": [one["eval_before"] for one in runs],
            "eval_after": [one["eval_after"] for one in runs],
        }
        for name, runs in found.items()
    }
    print(json.dumps({"task": "sentence", "steps": arguments.steps, "seeds": arguments.seeds, **result}))


if __name__ == "__main__":
    main()
