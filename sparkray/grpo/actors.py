"""The actors of a run: engines that draw, and processes that score."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from sparkray.config.grpo import GrpoConfig, RewardConfig
from sparkray.grpo.rewards import RewardScorer, Sample, Score
from sparkray.models import prepare_model

if TYPE_CHECKING:
    from sparkray.grpo.rollouts import Drawing, PromptRequest, RolloutGroup

_KILL_MARGIN_SECONDS = 30.0


class RolloutActor:
    """One engine. Ray starts it again when it dies; it then has the base weights and draws nothing until a push."""

    def __init__(self, config: Mapping[str, Any], engine_arguments: Mapping[str, Any]) -> None:
        # vLLM lets this older variable override the size that the settings give.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        from sparkray.grpo.vllm_rollouts import VllmRollouts

        settings = GrpoConfig.model_validate(config)
        self._rollouts = VllmRollouts(prepare_model(settings.model), settings, engine_arguments=engine_arguments)
        self._prepared = False

    async def ready(self) -> int:
        """The version of its weights, once it can be pushed to."""
        if not self._prepared:
            await self._rollouts.prepare()
            self._prepared = True
        return self._rollouts.version

    async def generate(
        self, requests: Sequence[PromptRequest], drawing: Drawing, *, version: int
    ) -> list[RolloutGroup]:
        with self._ending_with_its_engine():
            return await self._rollouts.generate(requests, drawing, version=version)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        with self._ending_with_its_engine():
            return await self._rollouts.score(token_ids)

    async def begin(self) -> None:
        with self._ending_with_its_engine():
            await self._rollouts.begin()

    async def load(self, payload: bytes, adapter_config: Mapping[str, Any] | None = None) -> None:
        with self._ending_with_its_engine():
            await self._rollouts.load(payload, adapter_config)

    async def finish(self, version: int) -> None:
        with self._ending_with_its_engine():
            await self._rollouts.finish(version)

    @contextmanager
    def _ending_with_its_engine(self) -> Iterator[None]:
        """End this process when vLLM's own is dead: nothing else brings the engine back."""
        try:
            yield
        except Exception:
            if self._rollouts.is_dead:
                os._exit(1)
            raise


class RewardActor:
    """Scores completions in its process's main thread, where a time limit can interrupt them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scorer = RewardScorer(RewardConfig.model_validate(config))

    def score(self, samples: Sequence[Sample], *, verifiable: bool = False) -> list[Score]:
        return self._scorer.score(samples, verifiable=verifiable)


class RewardPool:
    """Reward actors as one scorer. One that does not come back is replaced, and what it held counts as failed.

    Args:
        config: of the rewards.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._workers = [self._start() for _ in range(config.num_workers)]

    def score(self, groups: Sequence[Sequence[Sample]], *, verifiable: bool = False) -> list[list[Score]]:
        """Scores of each group, in order; `verifiable` leaves the shaping out."""
        limit = self._config.time_limit_seconds
        waiting = [
            (place % len(self._workers), samples, self._ask(place % len(self._workers), samples, verifiable))
            for place, samples in enumerate(groups)
        ]
        num_each = -(-len(groups) // len(self._workers))
        scores: list[list[Score]] = []
        for number, samples, answer in waiting:
            try:
                bound = limit * len(samples) * num_each + _KILL_MARGIN_SECONDS
                scores.append(ray.get(answer, timeout=bound))
            except (GetTimeoutError, RayActorError) as failure:
                reason = f"the reward's process was ended: {type(failure).__name__}"
                scores.append([Score(float("nan"), failure=reason) for _ in samples])
                ray.kill(self._workers[number])
                self._workers[number] = self._start()
        return scores

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def _ask(self, number: int, samples: Sequence[Sample], verifiable: bool) -> Any:
        return self._workers[number].score.remote(samples, verifiable=verifiable)

    def _start(self) -> ActorHandle:
        actor = ray.remote(num_cpus=0.1, num_gpus=0, max_restarts=0, scheduling_strategy="DEFAULT")(RewardActor)
        handle: ActorHandle = actor.remote(self._config.model_dump())
        return handle


def start_engines(config: GrpoConfig, engine_arguments: Mapping[str, Any], *, on_cpu: bool) -> list[ActorHandle]:
    """The rollout actors, spread over the nodes; they are starting when this returns."""
    num_gpus = 0 if on_cpu else config.engine.tensor_parallel_size * config.engine.pipeline_parallel_size
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}
    actor = ray.remote(
        num_cpus=config.cpus_per_engine,
        num_gpus=num_gpus,
        max_restarts=config.max_failures,
        scheduling_strategy="SPREAD",
        runtime_env={"env_vars": environment},
    )(RolloutActor)
    values = config.model_dump(mode="json")
    return [actor.remote(values, dict(engine_arguments)) for _ in range(config.num_engines)]
