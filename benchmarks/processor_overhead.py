"""Tokens per second with METIS over without, and the same for a plain Python port of the published processor.

    python benchmarks/processor_overhead.py --json

One engine in this process serves all sides. Between two rounds, when no request runs, the list of processors in the
engine's batch is exchanged: vLLM's own and METIS's (`metis`), vLLM's own alone, as an engine without METIS has it
(`none`), or vLLM's own and the port (`port`). So weights, memory, compiled code and machine are the same, and the
processor is the only difference. Every round decodes a full batch, all of it watched; the clock starts when all prompts
are read, since reading them is work without a processor's share. The sides take turns within a round, in an order that
is reversed from round to round; a ratio is the median over rounds of the ratio of one round, the CPU's ratio likewise
from the CPU seconds of the process, which depend less on who else uses the machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

SIDES = ("none", "metis", "port")
NUM_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Round:
    """One side's share of a round."""

    wall_seconds: float
    cpu_seconds: float
    num_tokens: int


class Bench:
    """The engine, and the three lists of processors."""

    def __init__(self, num_threads: int, max_batch: int, *, compiled: bool) -> None:
        import torch
        from metis_plain import PlainMetisProcessor
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.sample.logits_processor import LogitsProcessors

        from sparkray.config.metis import MetisConfig
        from sparkray.metis.vllm_engine import prepare
        from sparkray.metis.vllm_processor import MetisLogitsProcessor
        from sparkray.models import EMBEDDED, prepare_model

        arguments = EngineArgs(
            model=str(prepare_model(EMBEDDED)),
            max_model_len=512,
            max_num_seqs=max_batch,
            enable_prefix_caching=False,
            enforce_eager=not compiled,
            disable_log_stats=True,
        )
        config = arguments.create_engine_config()
        self.arena = prepare(config, MetisConfig())
        self.engine: Any = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        torch.set_num_threads(num_threads)
        self._batch = self._runner().input_batch
        loaded = list(self._batch.logitsprocs.all)
        own = [processor for processor in loaded if not isinstance(processor, MetisLogitsProcessor)]
        assert len(own) == len(loaded) - 1
        port = PlainMetisProcessor(config, torch.device("cpu"), False)
        self._sides = {
            "none": LogitsProcessors(own),
            "metis": LogitsProcessors(loaded),
            "port": LogitsProcessors([*own, port]),
        }
        self._num_requests = 0
        self._chance = random.Random(0)

    def _runner(self) -> Any:
        return self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def run(self, side: str, batch_size: int, num_tokens: int, temperature: float) -> Round:
        """Decode `batch_size` requests of `num_tokens` each on one side."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._batch.logitsprocs = self._sides[side]
        # vLLM keeps the list of output tokens up to date only where a processor may read it.
        self._batch.logitsprocs_need_output_token_ids = side != "none"
        slots = [self.arena.claim() for _ in range(batch_size)]
        for slot in slots:
            self._num_requests += 1
            params = SamplingParams(
                temperature=temperature,
                max_tokens=num_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={"metis": True, "metis_slot": slot.index, "metis_generation": slot.generation},
            )
            prompt = {"prompt_token_ids": [self._chance.randrange(1000, 40000) for _ in range(NUM_PROMPT_TOKENS)]}
            self.engine.add_request(f"request-{self._num_requests}", prompt, params)
        self.engine.step()
        # The clock starts with the whole batch in decode, whatever a step has room for.
        while self._batch.num_reqs < batch_size:
            self.engine.step()
        wall, cpu = time.perf_counter(), time.process_time()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        measured = Round(time.perf_counter() - wall, time.process_time() - cpu, batch_size * (num_tokens - 1))
        written = [self.arena.progress(slot).written for slot in slots]
        assert written == [num_tokens if side == "metis" else 0] * batch_size
        for slot in slots:
            self.arena.release(slot)
        return measured

    def compare(self, batch_size: int, num_tokens: int, rounds: int, temperature: float) -> dict[str, object]:
        """The sides in turns at one batch size."""
        for side in SIDES:
            self.run(side, batch_size, 4, temperature)
        measured: dict[str, list[Round]] = {side: [] for side in SIDES}
        for number in range(rounds):
            for side in SIDES if number % 2 else reversed(SIDES):
                measured[side].append(self.run(side, batch_size, num_tokens, temperature))
        report: dict[str, object] = {}
        for side, name in (("metis", "ratio"), ("port", "ratio_python_port")):
            pairs = list(zip(measured["none"], measured[side], strict=True))
            walls = [without.wall_seconds / having.wall_seconds for without, having in pairs]
            cpus = [without.cpu_seconds / having.cpu_seconds for without, having in pairs]
            report[f"{name}_b{batch_size}"] = round(statistics.median(walls), 4)
            low, _, high = statistics.quantiles(walls, n=4)
            report[f"{name}_b{batch_size}_quartiles"] = [round(low, 4), round(high, 4)]
            report[f"cpu_{name}_b{batch_size}"] = round(statistics.median(cpus), 4)
        for side in SIDES:
            rates = [one.num_tokens / one.wall_seconds for one in measured[side]]
            report[f"tokens_per_second_{side}_b{batch_size}"] = round(statistics.median(rates), 1)
        return report


def main() -> None:
    """Run, print, and with --json print one object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=9, help="pairs; at least 7 say something")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each request")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--compiled", action="store_true", help="compile the model, which `sparkray serve` does not")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    bench = Bench(options.threads, max_batch=64, compiled=options.compiled)
    report: dict[str, object] = {}
    for batch_size in (16, 64):
        report.update(bench.compare(batch_size, options.tokens, options.rounds, options.temperature))
    bench.arena.close()
    report |= {
        "rounds": options.rounds,
        "tokens": options.tokens,
        "temperature": options.temperature,
        "threads": options.threads,
        "compiled": options.compiled,
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "vllm-cpu")},
    }
    if not options.json:
        for key, value in report.items():
            print(f"{key:36} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
