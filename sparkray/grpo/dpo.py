"""The second path: draw once, keep the best and the worst completion of each prompt, and train on the pairs by DPO.

The pairs and their file are ours; the loss and its loop are TRL's `DPOTrainer` (DPO: Rafailov et al., 2305.18290).
It is off-policy: what it learns from was drawn before it learned anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import InputError, MissingExtraError
from sparkray.grpo.rewards import Score
from sparkray.grpo.rollouts import RolloutGroup

_LEAST_MARGIN = 1e-8
_COLUMNS = ("prompt", "chosen", "rejected")


def preference_pairs(groups: Sequence[RolloutGroup], scores: Sequence[Sequence[Score]]) -> list[dict[str, Any]]:
    """A pair of each group that has a better and a worse completion, in TRL's preference format, with its margin.

    Raises:
        InputError: no group has.
    """
    pairs = []
    for group, group_scores in zip(groups, scores, strict=True):
        ranked = sorted((score.total, -place) for place, score in enumerate(group_scores) if score.total == score.total)
        if len(ranked) < 2 or ranked[-1][0] - ranked[0][0] <= _LEAST_MARGIN:
            continue
        best, worst = group.rollouts[-ranked[-1][1]], group.rollouts[-ranked[0][1]]
        prompt = group.row["prompt"]
        chosen, rejected = (
            one.text if isinstance(prompt, str) else [{"role": "assistant", "content": one.text}]
            for one in (best, worst)
        )
        margin = ranked[-1][0] - ranked[0][0]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin})
    if not pairs:
        raise InputError(
            f"none of {len(groups)} groups has a better and a worse completion, so there is nothing to prefer.",
            hint="Take prompts that the model sometimes gets right, or draw more completions of each.",
        )
    return pairs


def write_pairs(pairs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One JSON object a line, under another name first."""
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    draft.replace(path)


def train_on_pairs(
    model_path: Path, pairs: Path, config: GrpoConfig, into: Path, *, on_cpu: bool
) -> list[dict[str, Any]]:
    """Train an adapter by TRL's `DPOTrainer` and save it to `into`; the log, a row a step.

    Raises:
        MissingExtraError: trl, peft or datasets is not installed.
    """
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module(str(failure.name), "train") from failure
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(str(model_path))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = DPOConfig(
        output_dir=str(into),
        use_cpu=on_cpu,
        bf16=config.bf16,
        beta=config.dpo_beta,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=max(1, config.prompts_per_step // config.num_ranks),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        gradient_checkpointing=config.gradient_checkpointing,
        max_length=config.max_prompt_tokens + config.max_completion_tokens,
        seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    layers = list(range(*config.lora_layers)) if config.lora_layers is not None else None
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_targets),
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(str(model_path)),
        args=arguments,
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
        ),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        trainer.model.save_pretrained(str(into))
    return [dict(row) for row in trainer.state.log_history if "loss" in row]
