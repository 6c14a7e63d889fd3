"""The FP8 block format of DeepSeek checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titan_models.hugging_face.tensor_formats import TensorFormat
from titan_models.hugging_face.weight_mapping import WeightMapping


@dataclass(frozen=True)
class Fp8Blocks(TensorFormat):
    """A matrix of e4m3 numbers `[R, C]` with one scale for each block of `rows x columns`.

    The last blocks of a row or column of blocks may be smaller. Despite its name, `weight_scale_inv` is the factor by
    which the stored numbers are multiplied. Source: DeepSeek-AI, "DeepSeek-V3 technical report" (2024), section 3.3.
    """

    rows: int = 128
    columns: int = 128

    def shape(self, *tensors: Tensor) -> tuple[int, ...]:
        weight, scales = tensors
        sizes = zip(weight.shape, (self.rows, self.columns), strict=False)
        blocks = [math.ceil(length / size) for length, size in sizes]
        is_matrix = weight.dim() == 2 and weight.dtype == torch.float8_e4m3fn
        if not is_matrix or list(scales.shape) != blocks or not scales.dtype.is_floating_point:
            raise ValueError(
                f"An FP8 weight must be a matrix of torch.float8_e4m3fn with a floating-point scale for each block of "
                f"{self.rows} x {self.columns}, got a weight {list(weight.shape)} of {weight.dtype} with scales "
                f"{list(scales.shape)} (expected {blocks}) of {scales.dtype}. Download the checkpoint again."
            )
        return tuple(weight.shape)

    def find(self, mapping: WeightMapping, names: tuple[str, ...], shape: tuple[int, ...]) -> list[WeightMapping]:
        return [replace(mapping, hf_names=names, decode=self.dequantize)]

    def dequantize(self, weight_RC: Tensor, scales: Tensor) -> Tensor:
        """Return the dequantized weight `[R, C]` in fp32."""
        numbers_RC = weight_RC.to(torch.float32)
        for block_RC, scales_B in zip(numbers_RC.split(self.rows), scales.to(torch.float32), strict=True):
            block_RC *= scales_B.repeat_interleave(self.columns)[: weight_RC.shape[1]]
        return numbers_RC
