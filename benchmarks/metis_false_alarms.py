"""False alarms of the calibrated detector on answers that its profile was not fitted on, against the rate chosen.

Run `python benchmarks/metis_false_alarms.py RECORDING... [--json]` on what `sparkray metis record` wrote. The answers
of each recording are dealt into folds; each fold is counted under a profile fitted on the others, so every token is
unseen where it is counted. The last line is one JSON object, with a row a recording and average run length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from sparkray.metis.calibration import count_alarms, fit_profile
from sparkray.metis.recordings import Stream, read_recording

ARLS_TOKENS = (200.0, 1_000.0, 5_000.0)


def cross_validate(streams: tuple[Stream, ...], *, num_folds: int, temperature: float) -> dict[float, dict[str, float]]:
    """Alarms over all folds, for each average run length that was asked for."""
    order = np.random.default_rng(0).permutation(len(streams))
    counts = {arl: {"num_tokens": 0, "num_hedge": 0, "num_refuse": 0} for arl in ARLS_TOKENS}
    for fold in range(num_folds):
        held = [streams[at] for at in order[fold::num_folds]]
        rest = [streams[at] for number, at in enumerate(order) if number % num_folds != fold]
        profile = fit_profile(rest, model="held-out", temperature=temperature)
        for arl, sums in counts.items():
            found = count_alarms(profile, held, arl)
            for key in sums:
                sums[key] += getattr(found, key)
    return {arl: {**sums, "num_expected": sums["num_tokens"] / arl} for arl, sums in counts.items()}


def main() -> None:
    """Parse, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recordings", nargs="+", type=Path)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for path in options.recordings:
        recording = read_recording(path)
        found = cross_validate(recording.streams, num_folds=options.folds, temperature=recording.temperature or 0.0)
        for arl, sums in found.items():
            rows.append(
                {"model": recording.model, "temperature": recording.temperature, "arl_tokens": arl, "unseen": sums}
            )
            if not options.json:
                print(
                    f"{recording.model} at {recording.temperature}: one in {arl:6g} tokens was chosen, "
                    f"{sums['num_expected']:6.1f} expected in {sums['num_tokens']}, "
                    f"{sums['num_hedge']:4} HEDGE and {sums['num_refuse']:4} REFUSE seen"
                )
    print(json.dumps({"num_folds": options.folds, "rows": rows}))


if __name__ == "__main__":
    main()
