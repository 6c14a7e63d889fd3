"""Weights in FP8, as DeepSeek releases them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titan_models.hugging_face.tensor_formats import TensorFormat
from titan_models.hugging_face.weight_mapping import WeightMapping


@dataclass(frozen=True)
class Fp8Blocks(TensorFormat):
    """A matrix of e4m3 numbers `[R, C]` and the factors of its blocks, one for each `rows x columns`.

    The last blocks of a row or column of them may be smaller. StoredWeight: DeepSeek-AI, "DeepSeek-V3 technical report"
    (2024), 3.3; `weight_scale_inv` is what a number is multiplied by.
    """

    rows: int = 128
    columns: int = 128

    def shape(self, *parts: Tensor) -> tuple[int, ...]:
        weight, factors = parts
        sizes = zip(weight.shape, (self.rows, self.columns), strict=False)
        blocks = [math.ceil(length / size) for length, size in sizes]
        is_matrix = weight.dim() == 2 and weight.dtype == torch.float8_e4m3fn
        if not is_matrix or list(factors.shape) != blocks or not factors.dtype.is_floating_point:
            raise ValueError(
                f"Got an FP8 weight {list(weight.shape)} of {weight.dtype} with factors {list(factors.shape)} of "
                f"{factors.dtype}. It is a matrix of torch.float8_e4m3fn, and each block of {self.rows} x "
                f"{self.columns} has a floating-point factor: {blocks}. Download it again."
            )
        return tuple(weight.shape)

    def find(self, mapping: WeightMapping, names: tuple[str, ...], shape: tuple[int, ...]) -> list[WeightMapping]:
        return [replace(mapping, hf_names=names, decode=self.numbers)]

    def numbers(self, weight_RC: Tensor, factors: Tensor) -> Tensor:
        """The numbers `[R, C]`, fp32."""
        numbers_RC = weight_RC.to(torch.float32)
        for block_RC, factors_B in zip(numbers_RC.split(self.rows), factors.to(torch.float32), strict=True):
            block_RC *= factors_B.repeat_interleave(self.columns)[: weight_RC.shape[1]]
        return numbers_RC
