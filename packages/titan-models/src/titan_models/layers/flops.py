"""Floating point operations, in both conventions people quote."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """Operations of the matrix products, forward and backward; recomputation and elementwise work are not counted.

    `full` counts every query with every key, as PaLM's appendix B and most published MFU do; `causal` counts the half
    of the attention products that a causal mask leaves.
    """

    full: int
    causal: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.full + other.full, self.causal + other.causal)


def matmul_flops(weights: int) -> Flops:
    """One token through a matrix of `weights` entries: 2 operations each forward, 4 backward."""
    return Flops(6 * weights, 6 * weights)
