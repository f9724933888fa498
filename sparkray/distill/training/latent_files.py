"""A trained latent student in one folder: its own weights, its autoencoder's, the shapes and the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sparkray.config.distill import LatentConfig
from sparkray.distill.students.latent import LatentStudent
from sparkray.distill.training.autoencoder import load_autoencoder, save_autoencoder
from sparkray.errors import NotFoundError

_DESCRIPTION, _WEIGHTS = "latent.json", "latent.pt"


def is_latent(folder: Path) -> bool:
    """Whether a folder holds a latent student."""
    return (folder / _DESCRIPTION).is_file()


def save_latent(student: LatentStudent, folder: Path, *, max_chunks: int, tokenizer_sha256: str) -> None:
    """Write the student; the description comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    save_autoencoder(student.autoencoder, folder, tokenizer_sha256)
    own = {name: value for name, value in student.state_dict().items() if not name.startswith("autoencoder.")}
    building = folder / f"{_WEIGHTS}.building"
    torch.save(own, building)
    building.rename(folder / _WEIGHTS)
    described = {
        "config": student.config.model_dump(),
        "max_chunks": max_chunks,
        "tokenizer_sha256": tokenizer_sha256,
    }
    building = folder / f"{_DESCRIPTION}.building"
    building.write_text(json.dumps(described, indent=1), encoding="utf-8")
    building.rename(folder / _DESCRIPTION)


def load_latent(folder: Path) -> LatentStudent:
    """A latent student from its folder.

    Raises:
        NotFoundError: the folder holds none.
    """
    if not is_latent(folder):
        raise NotFoundError(
            f"{folder} holds no latent student.", hint="Train one: sparkray distill train --autoencoder."
        )
    described = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    autoencoder = load_autoencoder(folder, described["tokenizer_sha256"])
    student = LatentStudent(LatentConfig(**described["config"]), autoencoder, described["max_chunks"])
    weights = torch.load(folder / _WEIGHTS, weights_only=True, map_location="cpu")
    student.load_state_dict({f"autoencoder.{k}": v for k, v in autoencoder.state_dict().items()} | weights)
    return student.eval()
