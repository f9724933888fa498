"""Tokenizer and lineage of a model folder, read from `tokenizer.json` and the headers of its safetensors files."""

from __future__ import annotations

import json
import struct
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np

from sparkray.errors import InputError, NotFoundError
from sparkray.handoff.fingerprint import lineage_hash, tokenizer_hash
from sparkray.handoff.rows import Floats, to_float32

_DTYPES: dict[str, Any] = {"BF16": ("bfloat16", "<u2"), "F16": ("float16", "<f2"), "F32": ("float32", "<f4")}
_NORMS = ("input_layernorm", "post_attention_layernorm")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        NotFoundError: there is none.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as failure:
        raise NotFoundError(f"{folder} holds no config.json, and a model folder is expected.") from failure
    return config


def folder_tokenizer(folder: Path) -> str:
    """Hash of the tokens in `tokenizer.json`; "none" where a model has no tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "none"
    content = json.loads(path.read_text(encoding="utf-8"))
    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    return tokenizer_hash(by_id[index] for index in sorted(by_id))


def folder_lineage(folder: Path) -> str:
    """Hash of the norm gains: before attention and feed-forward of every layer, then the last one."""
    num_layers = int(read_config(folder)["num_hidden_layers"])
    names = [f"model.layers.{layer}.{norm}.weight" for layer in range(num_layers) for norm in _NORMS]
    return lineage_hash(map(TensorFolder(folder), [*names, "model.norm.weight"]))


def folder_weights(folder: Path) -> str:
    """Type of the weights: the quantisation method, or the stored type."""
    config = read_config(folder)
    quantization = config.get("quantization_config") or config.get("quantization")
    if isinstance(quantization, dict):
        return f"{quantization.get('quant_method', 'mlx')}-{quantization.get('bits', '')}".rstrip("-")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


class TensorFolder:
    """Tensors of a folder's safetensors files by name, each read when it is asked for, as float32."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: dict[str, tuple[Path, int, Any]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            self._index |= {name: (path, 8 + size, entry) for name, entry in header.items() if name != "__metadata__"}

    @property
    def names(self) -> Set[str]:
        return self._index.keys()

    def __call__(self, name: str) -> Floats:
        """One tensor.

        Raises:
            InputError: it is not there, or is quantised.
        """
        if name not in self._index:
            raise InputError(f"{self._folder} holds no tensor {name}, which its configuration announces.")
        path, base, entry = self._index[name]
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{name} in {path} has type {entry['dtype']}; {', '.join(_DTYPES)} are read.")
        dtype, storage = _DTYPES[entry["dtype"]]
        first, last = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(base + first)
            array = to_float32(np.frombuffer(file.read(last - first), storage), dtype)
        return array.reshape(entry["shape"])
