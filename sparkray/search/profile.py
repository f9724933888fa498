"""A calibrated profile: all that `certified` needs, for one model, one temperature and the tasks it was made on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkray.config.search import DEFAULT_RISK
from sparkray.errors import InputError, NotFoundError
from sparkray.search.logistic import Logistic, logistic_from_dict, logistic_to_dict
from sparkray.search.policies.certified import Certified
from sparkray.search.scorer import PathScorer, scorer_from_dict, scorer_to_dict
from sparkray.search.stopping import STATE_FEATURES

_FORMAT = "sparkray-search-profile"
_VERSION = 2
_TEMPERATURE_GAP = 0.05
_PACKAGED = Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True)
class SearchProfile:
    """What calibration found.

    Attributes:
        model, temperature, tasks: what it was calibrated on, and is valid for.
        scorer: P(right) of a path.
        regret: what stopping costs.
        prune_below: for each alpha, rising, the threshold of pruning; None where the calibration questions were too
            few to certify any.
        stop_below: for each alpha and each risk the threshold of stopping; None likewise.
        delta: 1 - the confidence of each certified threshold.
        num_questions: calibration questions, and of these the ones that certified.
    """

    model: str
    temperature: float
    tasks: tuple[str, ...]
    scorer: PathScorer
    regret: Logistic
    prune_below: Mapping[float, float | None]
    stop_below: Mapping[tuple[float, float], float | None]
    delta: float
    num_questions: int
    num_certifying: int

    @property
    def name(self) -> str:
        return f"{self.model}, temperature {self.temperature:g}, tasks {', '.join(self.tasks)}"

    def check(self, model: str, temperature: float, task: str | None = None) -> None:
        """Refuse use beyond what was calibrated.

        Raises:
            InputError: made for another model, temperature or task; the message names both.
        """
        if model != self.model:
            raise InputError(
                f"the profile was calibrated for the model {self.model!r}, and the model is {model!r}.",
                hint="Calibrate one on paths of this model: sparkray search record, then sparkray search calibrate.",
                param="profile",
            )
        if abs(temperature - self.temperature) > _TEMPERATURE_GAP:
            raise InputError(
                f"the profile was calibrated at temperature {self.temperature:g}, and the temperature is "
                f"{temperature:g}.",
                hint=f"Search at temperature {self.temperature:g}, or calibrate at {temperature:g}.",
                param="profile",
            )
        if task is not None and task not in self.tasks:
            raise InputError(
                f"the profile was calibrated on the tasks {', '.join(self.tasks)}, and the task is {task!r}.",
                hint="Its error rates hold for its own tasks only; calibrate one on this task.",
                param="profile",
            )

    def policy(
        self, alpha: float = 0.05, risk: float = DEFAULT_RISK, wave: int = 4, task: str | None = None
    ) -> Certified:
        """The policy that prunes a right path with probability <= `alpha` and stops wrongly with <= `risk`.

        Of the calibrated levels the largest that is not above the one asked for is used; below the smallest, nothing
        is pruned or stopped early. `task` is that of the questions, where it is known; without it the second promise
        is not certified, as votes then weigh by a model of all tasks.

        Raises:
            InputError: a level outside of (0, 1).
        """
        for name, level in (("alpha", alpha), ("risk", risk)):
            if not 0 < level < 1:
                raise InputError(f"{name} is {level:g}, and a rate above 0 and below 1 is expected.", param=name)
        pruned_at = max((level for level in self.prune_below if level <= alpha), default=None)
        prune_below = self.prune_below[pruned_at] if pruned_at is not None else None
        stops = [key for key in self.stop_below if key[0] == (pruned_at or 0.0) and key[1] <= risk]
        stop_below = self.stop_below[max(stops)] if stops else None
        return Certified(
            scorer=self.scorer,
            prune_below=prune_below or 0.0,
            regret=self.regret if stop_below is not None else None,
            stop_below=stop_below or 0.0,
            wave=wave,
            task=task,
        )

    def save(self, path: Path) -> None:
        """Write as JSON, to a temporary file first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.model,
            "temperature": self.temperature,
            "tasks": list(self.tasks),
            "scorer": scorer_to_dict(self.scorer),
            "state_features": list(STATE_FEATURES),
            "regret": logistic_to_dict(self.regret),
            "prune_below": [[alpha, value] for alpha, value in self.prune_below.items()],
            "stop_below": [[alpha, risk, value] for (alpha, risk), value in self.stop_below.items()],
            "delta": self.delta,
            "num_questions": self.num_questions,
            "num_certifying": self.num_certifying,
        }


def packaged_profile(model: str) -> Path:
    """The profile that ships with the package for `model`.

    Raises:
        NotFoundError: there is none.
    """
    path = _PACKAGED / f"{model.lower()}.json"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in _PACKAGED.glob("*.json"))) or "none"
        raise NotFoundError(
            f"no search profile is packaged for the model {model!r}; there are: {known}.",
            hint="Make one: sparkray search record, then sparkray search calibrate.",
            param="profile",
        )
    return path


def load_profile(path: Path) -> SearchProfile:
    """Read what `SearchProfile.save` wrote.

    Raises:
        NotFoundError: no such file.
        InputError: not a profile of this version, or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise NotFoundError(
            f"there is no search profile {str(path)!r}.", hint="Make one with `sparkray search calibrate`."
        ) from failure
    except (OSError, ValueError) as failure:
        raise InputError(f"the search profile {str(path)!r} cannot be read: {failure}.") from failure
    if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
        raise InputError(f"{str(path)!r} is not a search profile of version {_VERSION}; calibrate it again.")
    try:
        if tuple(data["state_features"]) != STATE_FEATURES:
            raise ValueError(f"its state features are {data['state_features']}, not {list(STATE_FEATURES)}")
        return SearchProfile(
            model=str(data["model"]),
            temperature=float(data["temperature"]),
            tasks=tuple(str(task) for task in data["tasks"]),
            scorer=scorer_from_dict(data["scorer"]),
            regret=logistic_from_dict(data["regret"], len(STATE_FEATURES)),
            prune_below={float(alpha): _level(value) for alpha, value in data["prune_below"]},
            stop_below={(float(alpha), float(risk)): _level(value) for alpha, risk, value in data["stop_below"]},
            delta=float(data["delta"]),
            num_questions=int(data["num_questions"]),
            num_certifying=int(data["num_certifying"]),
        )
    except (KeyError, TypeError, ValueError) as failure:
        raise InputError(f"the search profile {str(path)!r} is damaged: {failure!r}.") from failure


def _level(value: Any) -> float | None:
    return None if value is None else float(value)
