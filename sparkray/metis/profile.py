"""Reference profiles: what a model's entropies look like when nothing is wrong.

A profile is fitted once on the entropy streams of ordinary answers of one model, at one temperature, on one kind of
task. It holds the mean, the standard deviation and the lag-1 autocorrelation of the entropy, so that the entropy
expected of a token follows from the token before it, and a table that turns a wanted average run length (tokens
between false alarms, ARL) into the two thresholds of the `calibrated` detector.

`calibration` fits profiles.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import InputError, NotFoundError, UsageError
from sparkray.metis.options import MAX_ARL_TOKENS, MIN_ARL_TOKENS

FORMAT_VERSION = 1

_PACKAGED_DIR = Path(__file__).parent / "profiles"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*){2}")
_PREPARED = re.compile(r"-\d+(\.\d+)+-c\d+$")
_MAX_TEMPERATURE_GAP = 0.15

Stream = NDArray[np.float64]


@dataclass(frozen=True)
class ReferenceProfile:
    """The entropies of one model at one temperature on one kind of task.

    Attributes:
        model: short lower-case name, e.g. "smollm2-135m-instruct".
        temperature: of the sampling that produced the reference streams.
        task: kind of prompts, e.g. "chat".
        mean_bits, std_bits: of the entropy over all reference tokens.
        lag1: correlation of the entropies of neighbouring tokens.
        hedge_drift, refuse_drift: what is taken off every z before it is summed. The HEDGE statistic notices small
            lasting shifts, the REFUSE statistic only large ones.
        table: rows (ARL in tokens, HEDGE threshold, REFUSE threshold), rising.
        num_streams, num_tokens, seed: what it was fitted on, and how.
    """

    model: str
    temperature: float
    task: str
    mean_bits: float
    std_bits: float
    lag1: float
    hedge_drift: float
    refuse_drift: float
    table: tuple[tuple[float, float, float], ...]
    num_streams: int
    num_tokens: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}/t{self.temperature:g}/{self.task}"

    @property
    def innovation_std_bits(self) -> float:
        """Standard deviation of an entropy around what the entropy before it leads to expect."""
        return self.std_bits * math.sqrt(1.0 - self.lag1**2)

    def thresholds(self, arl_tokens: float) -> tuple[float, float]:
        """(HEDGE, REFUSE) thresholds whose average run length is `arl_tokens`, each by itself.

        Between the rows of the table a threshold is linear in the logarithm of the ARL, which is the asymptotic law
        of CUSUM.
        """
        if not MIN_ARL_TOKENS <= arl_tokens <= MAX_ARL_TOKENS:
            raise InputError(
                f"an average run length of {arl_tokens:g} tokens was asked for, and {MIN_ARL_TOKENS:g} to "
                f"{MAX_ARL_TOKENS:g} can be had.",
                param="metis_arl",
            )
        arl, hedge, refuse = np.asarray(self.table).T
        at = math.log(arl_tokens)
        return float(np.interp(at, np.log(arl), hedge)), float(np.interp(at, np.log(arl), refuse))

    def z_scores(self, entropies: Stream) -> Stream:
        """Standardised entropies of one stream, each against what was expected before it was seen."""
        previous = np.concatenate(([self.mean_bits], entropies[:-1]))
        expected = self.mean_bits + self.lag1 * (previous - self.mean_bits)
        std = np.full(len(entropies), self.innovation_std_bits)
        std[:1] = self.std_bits
        z: Stream = (entropies - expected) / std
        return z

    def to_dict(self) -> dict[str, Any]:
        return {"format": "sparkray-metis-profile", "version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "profile") -> ReferenceProfile:
        """The profile that `to_dict` wrote.

        Raises:
            UsageError: another format or version, or fields that are missing or not numbers.
        """
        is_profile = isinstance(data, dict) and data.get("format") == "sparkray-metis-profile"
        found = data.get("version") if is_profile else None
        if found != FORMAT_VERSION:
            raise UsageError(
                f"{source} is not a reference profile of version {FORMAT_VERSION} (found: {found!r}).",
                hint="Fit it again with this version: `sparkray metis fit`.",
            )
        try:
            return cls(
                model=str(data["model"]),
                temperature=float(data["temperature"]),
                task=str(data["task"]),
                mean_bits=float(data["mean_bits"]),
                std_bits=float(data["std_bits"]),
                lag1=float(data["lag1"]),
                hedge_drift=float(data["hedge_drift"]),
                refuse_drift=float(data["refuse_drift"]),
                table=tuple((float(arl), float(hedge), float(refuse)) for arl, hedge, refuse in data["table"]),
                num_streams=int(data["num_streams"]),
                num_tokens=int(data["num_tokens"]),
                seed=int(data["seed"]),
            )
        except (KeyError, TypeError, ValueError) as failure:
            raise UsageError(f"{source} is a damaged reference profile: {failure!r}.") from failure

    def save(self, folder: Path) -> Path:
        """Write the profile below `folder` under its name, to a temporary file first."""
        path = _path_of(folder, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(self.to_dict(), file, indent=1, allow_nan=False)
            file.write("\n")
        Path(file.name).replace(path)
        return path


class ProfileStore:
    """Profiles in folders: those that the package brings, then those of `folders`; later ones win."""

    def __init__(self, folders: Iterable[Path | str] = ()) -> None:
        self._folders = (_PACKAGED_DIR, *(Path(folder) for folder in folders))
        self._loaded: dict[str, ReferenceProfile] = {}

    @classmethod
    def from_environment(cls, folders: Iterable[Path | str] = ()) -> ProfileStore:
        """The packaged profiles, then those of SPARKRAY_METIS_PROFILES (separated like PATH), then `folders`."""
        listed = os.environ.get("SPARKRAY_METIS_PROFILES", "").split(os.pathsep)
        return cls([*filter(None, listed), *folders])

    def names(self) -> tuple[str, ...]:
        """Sorted names of all stored profiles."""
        found = {
            path.relative_to(folder).with_suffix("").as_posix()
            for folder in self._folders
            for path in folder.glob("*/*/*.json")
        }
        return tuple(sorted(found))

    def load(self, name: str) -> ReferenceProfile:
        """The profile called `name`; read from disk once.

        Raises:
            NotFoundError: there is none.
            UsageError: its file cannot be used.
        """
        if name not in self._loaded:
            self._loaded[name] = self._read(name)
        return self._loaded[name]

    def find(self, model: str, temperature: float, task: str = "chat") -> ReferenceProfile:
        """The profile of a model (a name, hub id or folder) whose temperature is nearest, at most 0.15 away.

        Raises:
            NotFoundError: no profile fits; the message lists what there is.
        """
        slug = model_slug(model)
        of_model = [self.load(name) for name in self.names() if name.startswith(f"{slug}/")]
        near = [
            profile
            for profile in of_model
            if profile.task == task and abs(profile.temperature - temperature) <= _MAX_TEMPERATURE_GAP
        ]
        if not near:
            raise NotFoundError(
                f"no reference profile fits the model {slug!r} at temperature {temperature:g} and task {task!r} "
                f"(stored: {', '.join(self.names()) or 'none'}).",
                hint="Make one with `sparkray metis record` and `sparkray metis fit`, or use the detector 'metis'.",
                param="metis_profile",
            )
        return min(near, key=lambda profile: (abs(profile.temperature - temperature), profile.temperature))

    def _read(self, name: str) -> ReferenceProfile:
        for folder in reversed(self._folders):
            path = _path_of(folder, name)
            if not path.is_file():
                continue
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as failure:
                raise UsageError(f"the reference profile {path} cannot be read: {failure}.") from failure
            return ReferenceProfile.from_dict(data, source=str(path))
        raise NotFoundError(
            f"there is no reference profile {name!r} (stored: {', '.join(self.names()) or 'none'}).",
            param="metis_profile",
        )


def model_slug(model: str) -> str:
    """The last part of a hub id or path, lower case, for the name of a profile.

    The version that `sparkray.models` puts behind the name of a folder it prepared (`-0.1.2-c1`) is left out.
    """
    last = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", _PREPARED.sub("", last)).strip("-._") or "model"


def _path_of(folder: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is not the name of a profile.",
            hint="Names look like smollm2-135m-instruct/t0.7/chat: lower-case letters, digits, dots, dashes.",
            param="metis_profile",
        )
    return folder / f"{name}.json"
