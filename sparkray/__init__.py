"""sparkray: one Ray application that turns a few DGX Sparks, and the Macs beside them, into one machine.

The public names are loaded when they are first used, so that `import sparkray` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    "CoTBoostProcessor": "sparkray.metis.compat",
    "CognitiveRewardComputer": "sparkray.metis.reward",
    "CognitiveTrace": "sparkray.metis.trace",
    "MetisCUSUMProcessor": "sparkray.metis.compat",
    "MetisCompositeProcessor": "sparkray.metis.compat",
    "SparkrayError": "sparkray.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sparkray' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
