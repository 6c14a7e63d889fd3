"""The interface between context parallelism and attention cores, those of titan-models and of third-party models.

B batch, T queries, S keys, H heads, V features of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class MaskDescription(Protocol):
    """A dataclass that describes which keys each query sees; its fields may hold any part of the sequence."""

    @property
    def query_positions(self) -> Tensor:
        """[B, T] integers."""

    @property
    def key_positions(self) -> Tensor:
        """[B, S] integers."""

    @property
    def query_documents(self) -> Tensor | None:
        """[B, T] integers, or None: each sequence is one document."""

    @property
    def key_documents(self) -> Tensor | None:
        """[B, S] integers; None if and only if `query_documents` is None."""

    def visible(self) -> Tensor:
        """Return [B, T, S] bool, true where a query sees a key."""


BuildMask = Callable[[Any], Any]
"""A core's `build_mask`: from a mask description to the argument of its kernel."""


class AttentionKernel:
    """Attention of any queries to any keys; tensors are `[B, tokens, heads, features]`.

    (A plain class: torch 2.11 cannot compile code that creates a frozen dataclass.)
    """

    def __init__(
        self,
        output: Callable[[Tensor, Tensor, Tensor, Any], Tensor],
        output_and_lse: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]],
        sinks: Tensor | None = None,
    ) -> None:
        """`output(q, k, v, built_mask)` returns `[B, T, H, V]`; `output_and_lse` also returns the log-sum-exp
        `[B, T, H]`, which is -inf where a query sees no key. Both are differentiable. `sinks [H]` is an additional
        score for each head, without a value (attention sinks).
        """
        self.output = output
        self.output_and_lse = output_and_lse
        self.sinks = sinks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, built_mask: Any) -> Tensor:
        """Return the output with the sinks in its softmax."""
        if self.sinks is None:
            return self.output(q, k, v, built_mask)
        return self.with_sinks(*self.output_and_lse(q, k, v, built_mask))

    def with_sinks(self, output: Tensor, lse_BTH: Tensor) -> Tensor:
        """Add the sinks to the softmax of an output that was computed without them."""
        if self.sinks is None:
            return output
        return output * (lse_BTH - self.sinks.to(lse_BTH.dtype)).sigmoid().unsqueeze(-1).to(output.dtype)

    def of_heads(self, rank: int, num_ranks: int) -> AttentionKernel:
        """Return the kernel for one of `num_ranks` equal slices of the heads."""
        return (
            self
            if self.sinks is None
            else AttentionKernel(self.output, self.output_and_lse, self.sinks.chunk(num_ranks)[rank])
        )


class Method(Protocol):
    """A method of attention between the queries of one rank and the keys of all ranks."""

    def build_mask(self, build_mask: BuildMask, mask: MaskDescription) -> Any:
        """Return the argument `built_mask` of `attend`, from a mask that describes this rank's tokens."""

    def attend(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, built_mask: Any) -> Tensor:
        """Return the attention `[B, t, H, V]` of this rank's queries `[B, t, H, K]` to the keys of all ranks."""
