"""What context parallel needs of an attention core: of a model's own, or of one that stands for a foreign model's.

B batch, T queries, S keys, H heads, V features of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class MaskDescription(Protocol):
    """A dataclass that describes which keys queries see, by fields of which any part of the sequence may be put in."""

    @property
    def query_positions(self) -> Tensor:
        """[B, T] integers."""

    @property
    def key_positions(self) -> Tensor:
        """[B, S] integers."""

    @property
    def query_documents(self) -> Tensor | None:
        """[B, T] integers, or None: a row is one document."""

    @property
    def key_documents(self) -> Tensor | None:
        """[B, S] integers; given when `query_documents` is."""

    def visible(self) -> Tensor:
        """[B, T, S] bool: whether a query sees a key."""


BuildMask = Callable[[Any], Any]
"""A core's `build_mask`: a description to what its kernel wants."""


class AttentionKernel:
    """Attention of any queries to any keys: `(q, k, v, built_mask mask)`, all `[B, tokens, heads, features]`.

    (A plain class: torch 2.11 cannot compile code that makes a frozen dataclass.)
    """

    def __init__(
        self,
        output: Callable[[Tensor, Tensor, Tensor, Any], Tensor],
        output_and_lse: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]],
        sinks: Tensor | None = None,
    ) -> None:
        """`output` makes `[B, T, H, V]`; `output_and_lse` also the log-sum-exp `[B, T, H]`, -inf where a query sees
        nothing, both differentiable; `sinks [H]` is a score of each head that has no value.
        """
        self.output = output
        self.output_and_lse = output_and_lse
        self.sinks = sinks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, built_mask: Any) -> Tensor:
        """The output, sinks counted."""
        if self.sinks is None:
            return self.output(q, k, v, built_mask)
        return self.sunk(*self.output_and_lse(q, k, v, built_mask))

    def sunk(self, output: Tensor, lse_BTH: Tensor) -> Tensor:
        """An output whose softmax did not yet count the sinks, as if it had."""
        if self.sinks is None:
            return output
        return output * (lse_BTH - self.sinks.to(lse_BTH.dtype)).sigmoid().unsqueeze(-1).to(output.dtype)

    def of_heads(self, rank: int, num_ranks: int) -> AttentionKernel:
        """The kernel of one rank's equal share of the heads."""
        return (
            self
            if self.sinks is None
            else AttentionKernel(self.output, self.output_and_lse, self.sinks.chunk(num_ranks)[rank])
        )


class Method(Protocol):
    """How queries of one rank meet keys of the others."""

    def build_mask(self, build_mask: BuildMask, mask: MaskDescription) -> Any:
        """What `attend` needs of a mask that describes this rank's tokens."""

    def attend(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, built_mask: Any) -> Tensor:
        """Attention of this rank's queries to the keys of all ranks: `[B, t, H, K]` to `[B, t, H, V]`."""
