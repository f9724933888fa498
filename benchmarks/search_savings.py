"""What each policy of the parallel search saves, and what it costs in right answers, on the same recorded paths.

    python benchmarks/search_savings.py --json             replay the committed recording (no engine needed)
    python benchmarks/search_savings.py --record --json    record the paths anew first (an engine, an hour on a CPU)
    python benchmarks/search_savings.py --live --json      add 20 questions on the real engine: certified against full

The last line with `--json` is one object: for each policy `accuracy`, `interval`, `tokens`, `tokens_saved`,
`accuracy_delta` relative to `full`; ours under `ours`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from sparkray.config.search import RecordConfig
from sparkray.search.calibration import calibrate
from sparkray.search.evaluate import NUM_BOOTSTRAP
from sparkray.search.profile import load_profile, packaged_profile
from sparkray.search.recording import read_recording
from sparkray.search.suite import Comparison, compare_all
from sparkray.search.table import comparison_table
from sparkray.search.tasks import answer_kinds

RECORDING = Path(__file__).parent / "data" / "search_paths.parquet"
NUM_LIVE_QUESTIONS = 20


def measure(arguments: argparse.Namespace) -> tuple[Comparison, dict[str, Any]]:
    """The comparison on held-out questions and what it was made with."""
    recording = read_recording(arguments.recording, answer_kinds())
    if arguments.record or arguments.recalibrate:
        profile = calibrate(recording.info, recording.select("calibration"))
    else:
        profile = load_profile(packaged_profile(recording.info.model))
    compared = compare_all(recording, profile, alpha=arguments.alpha)
    return compared, {
        "model": recording.info.model,
        "temperature": recording.info.temperature,
        "num_calibration": profile.num_questions,
        "bootstrap": NUM_BOOTSTRAP,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--recording", type=Path, default=RECORDING, help="the recorded paths")
    parser.add_argument("--record", action="store_true", help="record the paths anew, to a file of its own")
    parser.add_argument(
        "--recalibrate", action="store_true", help="calibrate anew on the recording's calibration split"
    )
    parser.add_argument("--alpha", type=float, default=0.05, help="P(prune a right path) at most")
    parser.add_argument("--live", action="store_true", help="also search 20 questions on the real engine")
    parser.add_argument("--live-questions", type=int, default=NUM_LIVE_QUESTIONS)
    arguments = parser.parse_args()
    if arguments.record:
        from sparkray.search.vllm_dataset import record

        arguments.recording = Path(tempfile.mkdtemp(prefix="search-")) / RECORDING.name
        record(RecordConfig(), arguments.recording, lambda done, wanted: print(f"recorded {done}/{wanted} chunks"))
        print(f"recorded to {arguments.recording}")
    compared, origin = measure(arguments)
    print(comparison_table(compared))
    result = {**compared.to_dict(), **origin}
    if arguments.live:
        from sparkray.search.vllm_compare import compare_live

        result["live"] = compare_live(arguments.live_questions, alpha=arguments.alpha)
        print(f"live: {result['live']}")
    if arguments.json:
        print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    main()
