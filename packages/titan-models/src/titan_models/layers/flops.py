"""Floating-point operations (FLOPs) in both common conventions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """FLOPs of matrix products, forward and backward, without recomputation and elementwise operations.

    `full` counts each query with each key, as PaLM's appendix B and most published MFU numbers do; `causal` counts only
    the half of the attention products that a causal mask leaves.
    """

    full: int
    causal: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.full + other.full, self.causal + other.causal)


def matmul_flops(weights: int) -> Flops:
    """Return the FLOPs of one token times a matrix of `weights` entries: 2 per entry forward, 4 backward."""
    return Flops(6 * weights, 6 * weights)
