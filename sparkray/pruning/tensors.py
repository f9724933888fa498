"""Tensors of a checkpoint in a type that a forward can use: plain ones, and dense values of quantised ones.

MXFP4 (gpt-oss): E2M1 codes, two a byte, with one E8M0 scale per 32 values (OCP Microscaling 1.0).
FP8: one scale a tensor, a row, or a block of 128 x 128.
NVFP4: E2M1 codes with one E4M3 scale per 16 values and one float32 scale a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparkray.errors import InputError
from sparkray.pruning.checkpoint import Checkpoint

TORCH_DTYPE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MXFP4_BLOCK = 32
_ROWS_AT_ONCE = 1 << 16

# Suffixes of the tensors that hold scales; they are read together with the tensor that they belong to.
_SCALE_SUFFIXES = (
    "_scales", "_scale_inv", "_scale", "_scale_2", "_global_scale", "input_scale", "input_global_scale",
)  # fmt: skip


class LazyTensor:
    """A tensor that is read when it is indexed; transformers' loader asks for `tensor[...]`."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: object) -> torch.Tensor:
        tensor = self._read()
        return tensor if index is Ellipsis else tensor[index]  # type: ignore[index]


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor as it is stored.

    Raises:
        InputError: a type that torch does not have.
    """
    entry = checkpoint.tensors[name]
    dtype = TORCH_DTYPE.get(entry.dtype)
    if dtype is None:
        raise InputError(f"{name!r} has the type {entry.dtype}, which a forward pass cannot use.")
    if entry.num_bytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(checkpoint.read(name), dtype=dtype).reshape(entry.shape)


def dense_tensors(checkpoint: Checkpoint, names: list[str], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Dense tensors behind `names`: quantised ones are dequantised to `dtype`, and scales disappear.

    Floating tensors that are not quantised keep the type that they are stored in; the loader casts them.
    """
    dense: dict[str, LazyTensor] = {}
    for name in names:
        entry = checkpoint.tensors[name]
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            dense[base] = LazyTensor(_mxfp4_reader(checkpoint, base, dtype))
        elif name.endswith(".weight_packed") or (name.endswith(".weight") and entry.dtype == "U8"):
            dense[name.removesuffix("_packed")] = LazyTensor(_nvfp4_reader(checkpoint, name, dtype))
        elif entry.dtype in ("F8_E4M3", "F8_E5M2") and not name.endswith(_SCALE_SUFFIXES):
            dense[name] = LazyTensor(_fp8_reader(checkpoint, name, dtype))
        elif not _is_scale(checkpoint, name):
            dense[name] = LazyTensor(lambda name=name: read_tensor(checkpoint, name))  # type: ignore[misc]
    return dense


def dequantise_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values of MXFP4.

    Args:
        blocks: uint8 [..., groups, 16], two codes a byte, the low nibble first.
        scales: uint8 [..., groups], exponents with a bias of 127.
        dtype: type of the result.

    Returns:
        [..., groups * 32].
    """
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)
    flat_blocks, flat_scales = blocks.reshape(-1, blocks.shape[-1]), scales.reshape(-1, 1)
    out = torch.empty(len(flat_blocks), 2 * blocks.shape[-1], dtype=dtype)
    for start in range(0, len(flat_blocks), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes = flat_blocks[rows]
        values = torch.stack((table[(codes & 15).int()], table[(codes >> 4).int()]), dim=-1).flatten(-2)
        out[rows] = torch.ldexp(values, flat_scales[rows].int() - 127).to(dtype)
    return out.reshape(*scales.shape[:-1], -1)


def dequantise_fp8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` times a scale of one value, a value a row, or a value a block of evenly split rows and columns.

    The stacked form [experts, rows, columns] has a leading dimension on both.
    """
    scale = scale.float()
    if scale.numel() == 1:
        return (weight.float() * scale.reshape(())).to(dtype)
    if scale.dim() < weight.dim():
        scale = scale.unsqueeze(-1)
    for axis in range(weight.dim()):
        if scale.shape[axis] not in (1, weight.shape[axis]):
            block = _block_size(weight.shape[axis], scale.shape[axis])
            scale = scale.repeat_interleave(block, dim=axis).narrow(axis, 0, weight.shape[axis])
    return (weight.float() * scale).to(dtype)


def dequantise_nvfp4(
    packed: torch.Tensor, scale: torch.Tensor, tensor_scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Values of NVFP4: codes [..., columns / 2], E4M3 scales [..., columns / 16], times one scale a tensor."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)
    values = torch.stack((table[(packed & 15).int()], table[(packed >> 4).int()]), dim=-1).flatten(-2)
    block = values.shape[-1] // scale.shape[-1]
    return (values * (scale.float() * tensor_scale).repeat_interleave(block, dim=-1)).to(dtype)


def _block_size(length: int, num_blocks: int) -> int:
    # 128 wherever it fits: the last block of a dimension may be shorter than the others.
    for size in (128, 64, 32, 16):
        if -(-length // size) == num_blocks:
            return size
    return -(-length // num_blocks)


def _is_scale(checkpoint: Checkpoint, name: str) -> bool:
    if not name.endswith(_SCALE_SUFFIXES):
        return False
    stems = [name.removesuffix(suffix) for suffix in _SCALE_SUFFIXES if name.endswith(suffix)]
    return any(
        candidate in checkpoint.tensors
        for stem in stems
        for candidate in (stem, f"{stem}_blocks", f"{stem}_packed", f"{stem}weight", f"{stem}weight_packed")
    )


def _mxfp4_reader(checkpoint: Checkpoint, base: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        blocks, scales = read_tensor(checkpoint, f"{base}_blocks"), read_tensor(checkpoint, f"{base}_scales")
        # On disk the output dimension comes before the input's; gpt-oss computes hidden @ weight.
        return dequantise_mxfp4(blocks, scales, dtype).transpose(-2, -1).contiguous()

    return read


def _fp8_reader(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    scales = [f"{name}{suffix}" for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in checkpoint.tensors]
    if not scales:
        raise InputError(f"{name!r} is FP8 and has no {name}_scale_inv or {name}_scale beside it.")
    return lambda: dequantise_fp8(read_tensor(checkpoint, name), read_tensor(checkpoint, scales[0]), dtype)


def _nvfp4_reader(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    stem = name.removesuffix("_packed")
    scale = f"{stem}_scale"
    # ModelOpt multiplies by weight_scale_2; compressed-tensors divides by weight_global_scale.
    multiplier, divisor = f"{stem}_scale_2", f"{stem}_global_scale"
    if scale not in checkpoint.tensors or not {multiplier, divisor} & checkpoint.tensors.keys():
        raise InputError(
            f"{name!r} holds packed four-bit codes, and {scale} with {multiplier} or {divisor} is expected."
        )

    def read() -> torch.Tensor:
        if multiplier in checkpoint.tensors:
            tensor_scale = float(read_tensor(checkpoint, multiplier).float())
        else:
            tensor_scale = 1.0 / float(read_tensor(checkpoint, divisor).float())
        return dequantise_nvfp4(read_tensor(checkpoint, name), read_tensor(checkpoint, scale), tensor_scale, dtype)

    return read
