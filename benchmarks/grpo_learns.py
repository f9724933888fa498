"""Does GRPO teach anything: held-out accuracy before and after, beside a control whose advantages are shuffled.

    python benchmarks/grpo_learns.py --json

Two Ray nodes on this machine (two training ranks, one a node, and an engine), the embedded model, an adapter. Every
run is made by the same command path that `sparkray train grpo` takes. Tasks:

- one_token: is a word an animal or a thing; one token.
- reasoning: a reasoning-gym generator with worked examples in the prompt, completions of 16 tokens and more. Which one
  is decided here, by measurement, before anything is trained: of the candidates whose accuracy on training questions
  lies between 5 % and 60 %, the one in which most groups hold right and wrong completions. Accuracy is the mean over 8
  answers drawn to each held-out question at the temperature of training, which is what training raises; that of greedy
  answers stands beside it.

The control has the same rewards, groups and steps, and its advantages are dealt out at random. Seeds and arms are
interleaved. Intervals are Student's t over seeds at 95 %. With `--folder` a benchmark that was ended goes on: runs that
are finished there are read, and the one that was under way goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@dataclass(frozen=True)
class Candidate:
    """A generator of reasoning-gym, the pattern of the questions that are taken, how they are asked, and examples."""

    name: str
    settings: dict[str, Any]
    pattern: str
    question: str
    examples: tuple[tuple[str, str], ...]


CANDIDATES = (
    Candidate(
        "chain_sum",
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        r"(\d+ [-+] \d+ [-+] \d+)",
        "{0}",
        (
            ("2 + 3 + 4", "2 + 3 = 5. 5 + 4 = 9. The answer is 9."),
            ("9 - 4 + 1", "9 - 4 = 5. 5 + 1 = 6. The answer is 6."),
        ),
    ),
    Candidate(
        "gcd",
        {"min_value": 2, "max_value": 20},
        r"(\d+), (\d+)",
        "greatest common divisor of {0} and {1}",
        (
            ("greatest common divisor of 12 and 18", "12 = 6 * 2. 18 = 6 * 3. The answer is 6."),
            ("greatest common divisor of 9 and 14", "9 = 1 * 9. 14 = 1 * 14. The answer is 1."),
        ),
    ),
    Candidate(
        "letter_counting",
        {"min_words": 1, "max_words": 1},
        r'letter "(\w)" appear in the text: "([A-Za-z]{8,})"',
        'How many "{0}" in "{1}"?',
        (
            ('How many "e" in "green"?', "The letters are g, r, e, e, n. The answer is 2."),
            ('How many "a" in "dog"?', "The letters are d, o, g. The answer is 0."),
        ),
    ),
)


def right_answer(completions: list[str], entry: list[dict[str, Any]], **_: Any) -> list[float]:
    """1 where reasoning-gym's scorer gives all of its points, which it gives in part to what contains the answer."""
    import reasoning_gym

    from sparkray.grpo.rewards import final_answer

    return [
        float(reasoning_gym.get_score_answer_fn(one["metadata"]["source_dataset"])(final_answer(text), one) > 0.99)
        for text, one in zip(completions, entry, strict=True)
    ]


def reasoning_rows(candidate: Candidate, *, seed: int, count: int, taken: set[str]) -> list[dict[str, Any]]:
    """`count` different questions that are not in `taken`, which they are added to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    worked = "".join(f"Question: {asked}\nAnswer: {answer}\n\n" for asked, answer in candidate.examples)
    dataset = reasoning_gym.create_dataset(candidate.name, **candidate.settings, size=40 * count, seed=seed)
    rows: list[dict[str, Any]] = []
    for entry in dataset:
        found = re.search(candidate.pattern, entry["question"])
        if found is None:
            continue
        question = candidate.question.format(*found.groups())
        if question in taken:
            continue
        taken.add(question)
        # What the scorer reads; generators put numbers into the metadata that JSON has no type for.
        kept = {"answer": entry["answer"], "metadata": {"source_dataset": entry["metadata"]["source_dataset"]}}
        rows.append({"prompt": f"{worked}Question: {question}\nAnswer:", "entry": kept})
        if len(rows) == count:
            return rows
    raise SystemExit(f"{candidate.name} has only {len(rows)} of {count} different questions")


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A dataset's file; its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The mean's 95 % interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


@contextmanager
def two_nodes(num_cpus: int) -> Iterator[None]:
    """A Ray cluster of two nodes on this machine, with this process as its driver."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": num_cpus, "object_store_memory": 400 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def run_config(values: dict[str, Any], changes: dict[str, Any]) -> Any:
    """A run's settings."""
    from sparkray.config.base import validate_settings
    from sparkray.config.grpo import GrpoConfig

    return validate_settings(GrpoConfig, {**values, **changes})


def common(folder: Path) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        "output_dir": str(folder / "runs"),
        "accelerator": "cpu",
        "num_ranks": 2,
        "spread": True,
        "cpus_per_rank": 0.5,
        "cpus_per_engine": 0.5,
        "lora_layers": (20, 30),
        "num_generations": 8,
        "checkpoint_steps": 10,
        "eval_steps": 1000,
        "loss": {"name": "dr_grpo", "advantage": "group"},
        "engine": {
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 96,
            "kv_cache_gib": 0.5,
            "extra": {"block_size": 32},
        },
    }


def commonest_share(path: Path) -> float:
    """Share of rows whose answer is the one that most rows have."""
    answers = [json.loads(line)["entry"]["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    return Counter(answers).most_common(1)[0][1] / len(answers)


def finished_run(config: Any, engines: Any) -> dict[str, Any]:
    """The summary of a run, which is made unless the folder holds it already."""
    from sparkray.grpo.ray_run import SUMMARY_NAME, train_run
    from sparkray.serving.app import engine_kwargs

    kept = Path(config.output_dir) / config.run_name / SUMMARY_NAME
    if not kept.is_file():
        return train_run(config, engine_arguments=engine_kwargs, engines=engines)
    summary: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return summary


def measure(name: str, values: dict[str, Any], engines: Any, seeds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Every seed with and without a signal, interleaved; accuracy is that of drawn answers where the task has any."""
    kind = "eval_drawn" if values.get("eval_generations") else "eval"
    arms: dict[str, list[dict[str, Any]]] = {"real": [], "control": []}
    for seed in range(seeds):
        for arm, found in arms.items():
            run_name = f"{name}-{arm}-{seed}-of-{values['max_steps']}-steps"
            changes = {"seed": seed, "shuffle_advantages": arm == "control", "run_name": run_name}
            started = time.monotonic()
            found.append(finished_run(run_config(values, changes), engines))
            say(
                f"{name} {arm} seed {seed}: held-out {found[-1][f'{kind}_before']:.3f} -> "
                f"{found[-1][f'{kind}_after']:.3f}, greedy {found[-1]['eval_before']:.3f} -> "
                f"{found[-1]['eval_after']:.3f} in {time.monotonic() - started:.0f} s"
            )
    gains = {arm: [run[f"{kind}_after"] - run[f"{kind}_before"] for run in runs] for arm, runs in arms.items()}
    return {
        "before": [run[f"{kind}_before"] for run in arms["real"]],
        "after": [run[f"{kind}_after"] for run in arms["real"]],
        "control_after": [run[f"{kind}_after"] for run in arms["control"]],
        "gain": statistics.fmean(gains["real"]),
        "gain_interval": interval(gains["real"]),
        "control_gain": statistics.fmean(gains["control"]),
        "control_gain_interval": interval(gains["control"]),
        "greedy_before": [run["eval_before"] for run in arms["real"]],
        "greedy_after": [run["eval_after"] for run in arms["real"]],
        "greedy_control_after": [run["eval_after"] for run in arms["control"]],
        "steps": values["max_steps"],
        "canary_gap_max": max(run["canary_gap_max"] for run in arms["real"]),
        "entropy_ratio": [run["entropy_ratio"] for run in arms["real"]],
    }


def one_token(folder: Path, steps: int) -> dict[str, Any]:
    """Settings of the task of one token."""
    data = ROOT / "configs" / "grpo" / "data"
    return {
        **common(folder),
        "dataset": str(data / "animals_train.jsonl"),
        "eval_dataset": str(data / "animals_held_out.jsonl"),
        "prompts_per_step": 10,
        "max_steps": steps,
        "max_prompt_tokens": 64,
        "max_completion_tokens": 1,
        "learning_rate": 3e-4,
        "reward": {"terms": [{"kind": "exact"}]},
    }


def reasoning(folder: Path, candidate: Candidate, steps: int, num_held_out: int) -> dict[str, Any]:
    """Settings of a reasoning task, whose questions are written to `folder`."""
    taken: set[str] = set()
    held_out = reasoning_rows(candidate, seed=70_001, count=num_held_out, taken=taken)
    rows = reasoning_rows(candidate, seed=20_001, count=120, taken=taken)
    return {
        **common(folder),
        "dataset": write_rows(folder / f"{candidate.name}-train.jsonl", rows),
        "eval_dataset": write_rows(folder / f"{candidate.name}-held-out.jsonl", held_out),
        "eval_generations": 8,
        "prompts_per_step": 6,
        "max_steps": steps,
        "max_prompt_tokens": 128,
        "max_completion_tokens": 32,
        "stop": ("\n",),
        "learning_rate": 5e-4,
        "reward": {"terms": [{"kind": "python", "target": "grpo_learns:right_answer"}]},
    }


def choose(folder: Path, engines: Any, num_prompts: int, num_held_out: int) -> tuple[Candidate, list[dict[str, Any]]]:
    """The candidate to train on, and what was measured of each under the untrained model; measured once a folder."""
    kept = folder / "candidates.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_measured(folder, engines, num_prompts, num_held_out)), encoding="utf-8")
    measured: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
    fitting = [one for one in measured if 0.05 <= one["drawn_accuracy"] <= 0.60 and one["mean_tokens"] >= 16]
    if not fitting:
        raise SystemExit(f"no candidate lies between 5 % and 60 % with 16 tokens: {measured}")
    best = max(fitting, key=lambda one: one["mixed_groups"])
    return next(one for one in CANDIDATES if one.name == best["task"]), measured


def _measured(folder: Path, engines: Any, num_prompts: int, num_held_out: int) -> list[dict[str, Any]]:
    """Greedy and drawn accuracy, share of groups with right and wrong completions, and length of each candidate."""
    import ray
    from transformers import AutoTokenizer

    from sparkray.grpo.data import encode_rows, read_rows
    from sparkray.grpo.rewards import RewardScorer, Sample
    from sparkray.grpo.rollouts import Drawing, PromptRequest
    from sparkray.models import prepare_model

    tokenizer = AutoTokenizer.from_pretrained(str(prepare_model("embedded")))
    engine = engines[0]
    measured = []
    for candidate in CANDIDATES:
        config = run_config(reasoning(folder, candidate, 1, num_held_out), {})
        rows = read_rows(Path(config.dataset))[:num_prompts]
        scorer = RewardScorer(config.reward)
        found: dict[str, list[list[float]]] = {}
        lengths: list[int] = []
        # The engine holds the base weights until a first push, under the version -1.
        for arm, temperature, number in (("greedy", 0.0, 1), ("drawn", 1.0, 8)):
            ids = encode_rows(tokenizer, rows, config)
            asked = [PromptRequest(row, prompt, number) for row, prompt in enumerate(ids)]
            drawing = Drawing(temperature, config.max_completion_tokens, config.stop, watch=False)
            groups = ray.get(engine.generate.remote(asked, drawing, version=-1), timeout=1800)
            found[arm] = [
                [score.total for score in scorer.score([Sample(rows[g.row_index], one) for one in g.rollouts])]
                for g in groups
            ]
            lengths += [len(one.token_ids) for g in groups for one in g.rollouts]
        right = [[reward > 0.5 for reward in group] for group in found["drawn"]]
        measured.append(
            {
                "task": candidate.name,
                "greedy_accuracy": statistics.fmean(group[0] > 0.5 for group in found["greedy"]),
                "drawn_accuracy": statistics.fmean(statistics.fmean(group) for group in right),
                "mixed_groups": statistics.fmean(0 < sum(group) < len(group) for group in right),
                "mean_tokens": statistics.fmean(lengths),
            }
        )
    return measured


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--seeds", type=int, default=3, choices=[1, 2, 3, 4, 5])
    parser.add_argument("--one-token-steps", type=int, default=20)
    parser.add_argument("--reasoning-steps", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=50, help="held-out questions of the reasoning task")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with those that are here")
    parser.add_argument("--only", choices=["one_token", "reasoning"], help="one of the two tasks")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Else Ray gives an actor of half a CPU one thread; ranks and engine take turns, and may have the whole machine.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")))
    )

    def say(line: str) -> None:
        print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    from sparkray.grpo.ray_run import rollout_engines
    from sparkray.serving.app import engine_kwargs

    result: dict[str, Any] = {"seeds": arguments.seeds}
    with tempfile.TemporaryDirectory(prefix="grpo-learns-") as name, two_nodes(4):
        folder = arguments.folder.absolute() if arguments.folder is not None else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        shared = run_config(one_token(folder, 1), {})
        with rollout_engines(shared, engine_kwargs) as engines:
            if arguments.only != "one_token":
                candidate, measured = choose(folder, engines, 24, arguments.held_out)
                for one in measured:
                    say(json.dumps(one))
                values = reasoning(folder, candidate, arguments.reasoning_steps, arguments.held_out)
            if arguments.only != "reasoning":
                result["one_token"] = measure(
                    "one_token", one_token(folder, arguments.one_token_steps), engines, arguments.seeds, say
                )
            if arguments.only != "one_token":
                result["reasoning"] = {
                    "task": candidate.name,
                    "chosen_by": "most mixed groups of candidates that get 5 % to 60 % right untrained (drawn answers)",
                    "candidates": measured,
                    # What a policy reaches that has learnt the answers' frequencies and nothing else.
                    "commonest_answer_share": commonest_share(Path(values["eval_dataset"])),
                    **measure("reasoning", values, engines, arguments.seeds, say),
                }
    for task in ("one_token", "reasoning"):
        if task in result:
            found = result[task]
            say(
                f"{task}: gain {found['gain']:+.3f} {found['gain_interval']}, control {found['control_gain']:+.3f} "
                f"{found['control_gain_interval']}"
            )
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
