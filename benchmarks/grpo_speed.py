"""Completion tokens trained a CPU second, beside TRL's GRPOTrainer with its transformers generation.

    python benchmarks/grpo_speed.py --json

Both sides have the same model in float32, the same adapter, prompts, group size, lengths, reward and number of
completions a step; both draw, score, train and make the new weights current. CPU seconds are those of all processes of
a side (Ray's daemons and vLLM's own processes among them) from the end of the first step to the end of the last, so
start-up counts for neither. TRL computes without gradient checkpointing and with the whole step as one batch, which is
its quickest way here. Sides take turns; `ratio` is that of the medians. `one_off` is this project's side again, drawing
the next step's rollouts while a step is trained: what that is worth shows in `seconds_per_step`, not in CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NUM_PROMPTS, NUM_GENERATIONS, COMPLETION_TOKENS = 4, 8, 32
LORA_RANK, LORA_ALPHA, LORA_LAYERS, RATE = 16, 32.0, (20, 30), 1e-4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TOLD = "RESULT "
_lengths: list[int] = []

# CPU seconds, tokens and time at the end of a step.
Mark = tuple[float, int, float]


def any_reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number that a completion's text decides and that has nothing to teach: every group has a spread."""
    _lengths.extend(len(ids) for ids in completion_ids)
    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in completions]


def rows() -> list[dict[str, str]]:
    """Prompts of about 200 tokens: worked sums, and a sum to do."""
    worked = "".join(f"Question: {a} + {a + 7}\nAnswer: {a} + {a + 7} = {2 * a + 7}.\n\n" for a in range(3, 11))
    return [{"prompt": f"{worked}Question: {number} + {number + 5}\nAnswer:"} for number in range(40, 40 + NUM_PROMPTS)]


def cpu_seconds() -> float:
    """Of this process and all its descendants that live."""
    import psutil

    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def run_trl(num_steps: int, folder: Path) -> dict[str, float]:
    """TRL's side."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from sparkray.models import prepare_model

    path = str(prepare_model("embedded"))
    marks: list[Mark] = []

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((cpu_seconds(), sum(_lengths), time.monotonic()))

    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
        num_generations=NUM_GENERATIONS,
        max_completion_length=COMPLETION_TOKENS,
        max_steps=num_steps,
        learning_rate=RATE,
        loss_type="dr_grpo",
        beta=0.0,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapter = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        target_modules=list(TARGETS),
        layers_to_transform=list(range(*LORA_LAYERS)),
        task_type="CAUSAL_LM",
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward_funcs=any_reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows() * num_steps),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[Marks()],
    )
    trainer.train()
    return _between(marks[0], marks[-1], num_steps)


def run_ours(num_steps: int, folder: Path, steps_off: int = 0) -> dict[str, float]:
    """This project's side, by the way that `sparkray train grpo` goes."""
    import threading

    import ray

    from sparkray.config.base import validate_settings
    from sparkray.config.grpo import GrpoConfig
    from sparkray.grpo.metrics_log import read_log
    from sparkray.grpo.ray_run import train_run
    from sparkray.serving.app import engine_kwargs

    dataset = folder / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    config = validate_settings(
        GrpoConfig,
        {
            "dataset": str(dataset),
            "output_dir": str(folder),
            "accelerator": "cpu",
            "cpus_per_rank": 1.0,
            "cpus_per_engine": 1.0,
            "lora_rank": LORA_RANK,
            "lora_alpha": LORA_ALPHA,
            "lora_layers": LORA_LAYERS,
            "lora_targets": TARGETS,
            "num_generations": NUM_GENERATIONS,
            "prompts_per_step": NUM_PROMPTS,
            "max_steps": num_steps,
            "steps_off": steps_off,
            "max_prompt_tokens": 256,
            "max_completion_tokens": COMPLETION_TOKENS,
            "learning_rate": RATE,
            "checkpoint_steps": 1000,
            "reward": {"terms": [{"kind": "python", "target": "grpo_speed:any_reward"}]},
            "engine": {
                "dtype": "float32",
                "max_model_len": 320,
                "max_num_seqs": 64,
                "kv_cache_gib": 0.5,
                "extra": {"block_size": 32},
            },
        },
    )
    ray.init(num_cpus=4, object_store_memory=400 * 2**20, include_dashboard=False, log_to_driver=False)
    marks: list[Mark] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            found = read_log(folder / config.run_name)
            if len(found) > len(marks):
                mark = (cpu_seconds(), sum(row["num_tokens"] for row in found), time.monotonic())
                marks.extend([mark] * (len(found) - len(marks)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train_run(config, engine_arguments=engine_kwargs)
    finally:
        ended.set()
        watcher.join()
        ray.shutdown()
    return _between(marks[0], marks[num_steps - 1], num_steps)


def _between(first: Mark, last: Mark, num_steps: int) -> dict[str, float]:
    seconds, tokens = last[0] - first[0], last[1] - first[1]
    return {
        "cpu_seconds": seconds,
        "tokens": tokens,
        "tokens_per_cpu_second": tokens / seconds,
        "cpu_seconds_per_step": seconds / (num_steps - 1),
        "seconds_per_step": (last[2] - first[2]) / (num_steps - 1),
    }


def in_process(side: str, num_steps: int) -> dict[str, float]:
    """One side in a process of its own."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))),
    }
    with tempfile.TemporaryDirectory(prefix="grpo-speed-") as folder:
        command = [sys.executable, __file__, "--side", side, "--steps", str(num_steps), "--folder", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_TOLD):
            found: dict[str, float] = json.loads(line.removeprefix(_TOLD))
            return found
    raise SystemExit(f"the side {side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=1, help="turns of both sides")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn, the first of which does not count")
    parser.add_argument("--side", choices=["ours", "one_off", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        run: dict[str, Callable[[int, Path], dict[str, float]]] = {
            "ours": run_ours,
            "one_off": partial(run_ours, steps_off=1),
            "trl": run_trl,
        }
        print(_TOLD + json.dumps(run[arguments.side](arguments.steps, arguments.folder)), flush=True)
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "one_off": [], "trl": []}
    for turn in range(arguments.rounds):
        for side, results in found.items():
            started = time.monotonic()
            results.append(in_process(side, arguments.steps))
            rate = results[-1]["tokens_per_cpu_second"]
            line = f"round {turn + 1} {side}: {rate:.1f} tokens a CPU second ({time.monotonic() - started:.0f} s)"
            print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    rates = {side: [one["tokens_per_cpu_second"] for one in results] for side, results in found.items()}
    medians = {side: statistics.median(values) for side, values in rates.items()}
    result = {
        "ratio": medians["ours"] / medians["trl"],
        "tokens_per_cpu_second": medians,
        "rounds": rates,
        "num_prompts": NUM_PROMPTS,
        "num_generations": NUM_GENERATIONS,
        "completion_tokens": COMPLETION_TOKENS,
        **{
            name: {side: statistics.median(one[name] for one in results) for side, results in found.items()}
            for name in ("cpu_seconds_per_step", "seconds_per_step")
        },
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"ratio {result['ratio']:.2f}")


if __name__ == "__main__":
    main()
