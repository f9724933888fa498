"""What pruning costs: watching beside a plain forward, one layer in memory beside all, bytes beside load-and-save.

    python benchmarks/reap_cost.py --json

Three claims, each with both sides in turns and the ratio of their medians:

    observe_ratio        CPU seconds of a forward that is watched over those of the same forward that is not
    streaming_rss_share  peak resident memory of observing a layer at a time over that of the whole model in memory
    rewrite_speedup      CPU seconds of load, slice and save by transformers over those of byte surgery;
                         `rewrite_rss_mb` is the peak resident memory of the surgery's process

Memory is the peak of a whole process, interpreter and libraries included. CPU seconds are counted because they do not
depend on who else uses the machine. The checkpoint (qwen3_moe layout, bfloat16, --gb large) is made of repeated
random values in a temporary folder of --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, INNER, NUM_EXPERTS, TOP_K, VOCAB = 768, 448, 32, 4, 1024
PATTERN_BYTES = 4 * 1024 * 1024
SHARD_LAYERS = 8


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="turns of memory and rewrite")
    parser.add_argument("--observe-rounds", type=int, default=9, help="turns of plain and watched forwards")
    parser.add_argument("--parts", default="observe,memory,rewrite", help="which claims are measured")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is made")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(SIDES[arguments.side](*arguments.paths)))
        return
    parts = arguments.parts.split(",")
    result: dict[str, Any] = {"gb": arguments.gb, "num_cpus": os.cpu_count()}
    if "observe" in parts:
        result |= observe_cost(arguments.observe_rounds)
    if {"memory", "rewrite"} & set(parts):
        with tempfile.TemporaryDirectory(prefix="reap-cost-", dir=arguments.folder) as folder:
            model = Path(folder) / "model"
            result["checkpoint_bytes"] = write_checkpoint(model, arguments.gb)
            if "memory" in parts:
                result |= memory_cost(model, Path(folder), arguments.rounds)
            if "rewrite" in parts:
                result |= rewrite_cost(model, Path(folder), arguments.rounds)
    if arguments.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:28} {value}")


def observe_cost(rounds: int) -> dict[str, Any]:
    """Plain and watched forwards of one model, in turns."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparkray.pruning.observe import ExpertObserver

    torch.manual_seed(0)
    settings = model_config(num_layers=2) | {"num_experts": 64, "num_experts_per_tok": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32).eval()
    ids = torch.randint(0, VOCAB, (4, 256))
    mask = torch.ones_like(ids)
    mask[1, 200:] = 0
    plain: list[float] = []
    watched: list[float] = []

    def forward() -> float:
        start = time.process_time()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        return time.process_time() - start

    with torch.no_grad():
        implementation = model.config._experts_implementation
        forward()
        for _ in range(rounds):
            plain.append(forward())
            with ExpertObserver(model) as observer, observer.watching(mask):
                watched.append(forward())
            observer.take()
            model.config._experts_implementation = implementation
    return {
        "observe_ratio": statistics.median(watched) / statistics.median(plain),
        "plain_forward_cpu_seconds": statistics.median(plain),
        "observed_forward_cpu_seconds": statistics.median(watched),
    }


def memory_cost(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Peak memory of a process that observes, streaming and resident."""
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"input_ids": list(range(k, k + 64))}) + "\n" for k in range(8))
    )
    peaks: dict[str, list[float]] = {"streaming": [], "resident": []}
    for _ in range(max(1, rounds // 2)):
        for placement, found in peaks.items():
            found.append(run_side(placement, model, folder / "rows.jsonl")["rss_mb"])
    streaming, resident = (statistics.median(found) for found in peaks.values())
    return {
        "streaming_rss_share": streaming / resident,
        "streaming_rss_mb": streaming,
        "resident_rss_mb": resident,
    }


def rewrite_cost(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds and peak memory of cutting a quarter of the experts, by bytes and by transformers."""
    sides: dict[str, list[dict[str, float]]] = {"surgery": [], "load_and_save": []}
    for _ in range(rounds):
        for side, found in sides.items():
            found.append(run_side(side, model, folder / side))
            shutil.rmtree(folder / side)

    def median(side: str, key: str) -> float:
        return statistics.median(measured[key] for measured in sides[side])

    return {
        "rewrite_speedup": median("load_and_save", "cpu_seconds") / median("surgery", "cpu_seconds"),
        "rewrite_speedup_wall": median("load_and_save", "wall_seconds") / median("surgery", "wall_seconds"),
        "rewrite_rss_mb": max(measured["rss_mb"] for measured in sides["surgery"]),
        "rewrite_cpu_seconds": median("surgery", "cpu_seconds"),
        "load_and_save_cpu_seconds": median("load_and_save", "cpu_seconds"),
        "load_and_save_rss_mb": median("load_and_save", "rss_mb"),
    }


def run_side(side: str, *paths: Path) -> dict[str, float]:
    """One side in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--side", side, "--paths", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def observe_side(placement: str, model: Path, rows: Path) -> dict[str, float]:
    """Observe a few rows with the model placed as said."""
    from sparkray.config.pruning import CalibrationConfig, ObserveConfig
    from sparkray.pruning.calibration import read_calibration
    from sparkray.pruning.checkpoint import Checkpoint
    from sparkray.pruning.observation import ShardObserver

    data = read_calibration(rows, CalibrationConfig())
    config = ObserveConfig.model_validate({"placement": placement, "micro_batch_sequences": 4})
    ShardObserver(Checkpoint(model), config).observe(data.shards(8))
    return {"rss_mb": peak_rss_mb()}


def surgery_side(model: Path, target: Path) -> dict[str, float]:
    """Cut every fourth expert out of the bytes."""
    from sparkray.pruning.checkpoint import Checkpoint
    from sparkray.pruning.plan import PrunePlan
    from sparkray.pruning.rewrite import rewrite

    wall, cpu = time.perf_counter(), time.process_time()
    checkpoint = Checkpoint(model)
    num_layers = checkpoint.config["num_hidden_layers"]
    keep = tuple(expert for expert in range(NUM_EXPERTS) if expert % 4)
    plan = PrunePlan(
        model=checkpoint.identity, data="", family="qwen3_moe", criterion="reap", gate_source="model", protect="none",
        seed=42, ratio=0.25, num_experts_before=NUM_EXPERTS, num_experts_after=len(keep),
        kept={str(layer): keep for layer in range(num_layers)}, scores={}, frequency={}, zero_count={},
        super_experts={}, stability=None, bytes_before=0, bytes_after=0, num_tokens=0,
    )  # fmt: skip
    rewrite(checkpoint, plan, target)
    return measured_since(wall, cpu)


def load_and_save_side(model: Path, target: Path) -> dict[str, float]:
    """Load with transformers, slice the modules, save."""
    import torch
    from transformers import AutoModelForCausalLM

    keep = torch.tensor([expert for expert in range(NUM_EXPERTS) if expert % 4])
    wall, cpu = time.perf_counter(), time.process_time()
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    for layer in loaded.model.layers:
        for module in (layer.mlp.experts, layer.mlp.gate):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.detach()[keep], requires_grad=False))
    loaded.config.num_experts = len(keep)
    loaded.save_pretrained(target, max_shard_size="1GB")
    # The surgery ends with its bytes on the disk; so does this.
    for shard in target.glob("*.safetensors"):
        handle = os.open(shard, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return measured_since(wall, cpu)


def measured_since(wall: float, cpu: float) -> dict[str, float]:
    """Seconds since two clock readings, and the peak memory."""
    return {
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "rss_mb": peak_rss_mb(),
    }


def peak_rss_mb() -> float:
    """Peak resident memory of this program; getrusage would give the parent's where that was larger."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


SIDES = {
    "streaming": lambda *paths: observe_side("streaming", *paths),
    "resident": lambda *paths: observe_side("resident", *paths),
    "surgery": surgery_side,
    "load_and_save": load_and_save_side,
}


def model_config(num_layers: int) -> dict[str, Any]:
    """config.json of a qwen3_moe model of that depth."""
    return {
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }


def write_checkpoint(directory: Path, gigabytes: float) -> int:
    """A checkpoint of about that size, in shards of several layers; returns its tensor bytes."""
    import numpy as np

    directory.mkdir()
    num_layers = max(2, round(gigabytes * 1e9 / sum(num_bytes for _, _, num_bytes in layer_tensors(0))))
    config = model_config(num_layers) | {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(0).normal(scale=0.02, size=PATTERN_BYTES // 2).astype(np.float32)
    pattern = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16 is float32's upper half
    outside = [("model.embed_tokens.weight", (VOCAB, HIDDEN)), ("lm_head.weight", (VOCAB, HIDDEN))]
    groups = [[(name, shape, 2 * shape[0] * shape[1]) for name, shape in outside]]
    groups[0].append(("model.norm.weight", (HIDDEN,), 2 * HIDDEN))
    for start in range(0, num_layers, SHARD_LAYERS):
        layers = range(start, min(start + SHARD_LAYERS, num_layers))
        groups.append([tensor for layer in layers for tensor in layer_tensors(layer)])
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(groups, 1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= {name: shard for name, _, _ in tensors}
        total += write_shard(directory / shard, tensors, pattern)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...], int]], pattern: bytes) -> int:
    """One safetensors file of (name, shape, bytes), filled with the pattern; returns its tensor bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, num_bytes in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, num_bytes in tensors:
            while num_bytes:
                part = min(num_bytes, len(pattern))
                file.write(pattern[:part])
                num_bytes -= part
    return offset


def layer_tensors(layer: int) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape, bytes) of one layer's tensors in bfloat16."""
    prefix = f"model.layers.{layer}"
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (512, HIDDEN),
        "self_attn.k_proj.weight": (256, HIDDEN),
        "self_attn.v_proj.weight": (256, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, 512),
        "self_attn.q_norm.weight": (64,),
        "self_attn.k_norm.weight": (64,),
        "mlp.gate.weight": (NUM_EXPERTS, HIDDEN),
    }
    for expert in range(NUM_EXPERTS):
        shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (INNER, HIDDEN)
        shapes[f"mlp.experts.{expert}.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, INNER)
    tensors = []
    for name, shape in shapes.items():
        num_values = shape[0] if len(shape) == 1 else shape[0] * shape[1]
        tensors.append((f"{prefix}.{name}", shape, 2 * num_values))
    return tensors


if __name__ == "__main__":
    main()
