"""The MXFP4 format of GPT-OSS checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titan_models.hugging_face.tensor_formats import TensorFormat
from titan_models.hugging_face.weight_mapping import WeightMapping

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes (Open Compute Project, "Microscaling formats", 5.3.3)."""

_BLOCK = 32


@dataclass(frozen=True)
class Mxfp4(TensorFormat):
    """A stack of matrices in blocks of 32 4-bit numbers, each block with a power of two as its scale.

    A byte holds two numbers, the first in the lower half. Blocks `[E, R, C / 32, 16]` and exponents `[E, R, C / 32]`,
    both uint8, encode the transposed numbers `[E, C, R]`. They are read expert by expert.
    Source: Open Compute Project, "OCP microscaling formats (MX) specification" (2023).
    """

    def shape(self, *tensors: Tensor) -> tuple[int, ...]:
        blocks, exponents = tensors
        shapes_match = blocks.dim() == 4 and blocks.shape[-1] == _BLOCK // 2 and blocks.shape[:-1] == exponents.shape
        if not shapes_match or {blocks.dtype, exponents.dtype} != {torch.uint8}:
            raise ValueError(
                "MXFP4 blocks must be uint8 [experts, rows, columns / 32, 16] with a uint8 exponent each, got blocks "
                f"{list(blocks.shape)} of {blocks.dtype} with exponents {list(exponents.shape)} of {exponents.dtype}. "
                "Download the checkpoint again."
            )
        num_experts, rows, num_blocks = exponents.shape
        return num_experts, _BLOCK * num_blocks, rows

    def find(self, mapping: WeightMapping, names: tuple[str, ...], shape: tuple[int, ...]) -> list[WeightMapping]:
        return [
            WeightMapping(
                tuple((name, expert) for name, _ in mapping.own), names, mapping.transforms, _DequantizeExpert(expert)
            )
            for expert in range(shape[0])
        ]


@dataclass(frozen=True)
class _DequantizeExpert:
    """Dequantizes the matrix of one expert."""

    expert: int

    def __call__(self, blocks: Tensor, exponents: Tensor) -> Tensor:
        """Return the matrix `[C, R]` in fp32."""
        bytes_RCB = blocks[self.expert]
        codes_RCB = torch.stack((bytes_RCB & 15, bytes_RCB >> 4), dim=-1).flatten(-2)
        numbers_RCB = torch.tensor(_E2M1, device=blocks.device)[codes_RCB.int()]
        powers_RC = exponents[self.expert].int() - 127
        return torch.ldexp(numbers_RCB, powers_RC.unsqueeze(-1)).flatten(-2).mT
