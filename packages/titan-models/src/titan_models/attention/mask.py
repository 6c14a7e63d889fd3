"""Descriptions of attention masks, from which each attention core builds the form that its kernel needs."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from titan_config import Configurable
from torch import Tensor


class MaskModifier(Configurable, abc.ABC):
    """A restriction of a causal mask: `SlidingWindow`, `Chunks`, or a custom one."""

    @abc.abstractmethod
    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Return a bool tensor, True where a query sees a key, of the shape that the integer arguments broadcast to.

        Future keys and keys of other documents are masked already; the result for them is ignored.
        """


class SlidingWindow(MaskModifier):
    """Sliding-window attention: a query sees the last `size` keys, its own included."""

    class Config(MaskModifier.Config):
        size: int
        """Number of keys that a query sees, its own included."""

        def validate(self) -> None:
            if self.size < 1:
                raise ValueError(f"SlidingWindow size must be at least 1, got {self.size}.")

    def __init__(self, config: Config) -> None:
        self.size = config.size

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return query_position - key_position < self.size


class Chunks(MaskModifier):
    """Chunked attention: a query sees the keys of its own chunk."""

    class Config(MaskModifier.Config):
        size: int
        """Number of positions in a chunk."""

        def validate(self) -> None:
            if self.size < 1:
                raise ValueError(f"Chunks size must be at least 1, got {self.size}.")

    def __init__(self, config: Config) -> None:
        self.size = config.size

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return query_position // self.size == key_position // self.size


@dataclass(frozen=True)
class Mask:
    """The description of a causal mask, restricted to documents and by mask modifiers.

    Queries and keys have separate positions and document ids, so that either may be any shard of the sequence.
    B batch, T queries, S keys.
    """

    query_positions: Tensor
    """[B, T] integers; a query sees keys up to its own position."""

    key_positions: Tensor
    """[B, S] integers."""

    query_documents: Tensor | None = None
    """[B, T] integers; a query sees keys of its own document. None: each sequence is one document."""

    key_documents: Tensor | None = None
    """[B, S] integers; required with `query_documents`."""

    mask_modifiers: tuple[MaskModifier, ...] = ()
    """A query sees the keys that all of them keep."""

    @staticmethod
    def causal(
        positions: Tensor, documents: Tensor | None = None, mask_modifiers: tuple[MaskModifier, ...] = ()
    ) -> Mask:
        """Return the mask of self-attention for `positions` and `documents`, both `[B, T]`.

        Positions must increase within each document; without documents, within each sequence.
        """
        return Mask(positions, positions, documents, documents, mask_modifiers)

    def __post_init__(self) -> None:
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError(
                "query_documents and key_documents must be given together, got "
                f"{'query_documents' if self.key_documents is None else 'key_documents'} alone."
            )

    @property
    def only_causal(self) -> bool:
        """True if the mask is plainly causal: self-attention without documents and mask modifiers."""
        return self.query_positions is self.key_positions and self.query_documents is None and not self.mask_modifiers

    def visible(self) -> Tensor:
        """Return the dense mask `[B, T, S]`: bool, True where a query sees a key."""
        queries, keys = (..., slice(None), None), (..., None, slice(None))
        query_documents = None if self.query_documents is None else self.query_documents[queries]
        key_documents = None if self.key_documents is None else self.key_documents[keys]
        return self.rule(self.query_positions[queries], self.key_positions[keys], query_documents, key_documents)

    def rule(
        self, query_position: Tensor, key_position: Tensor, query_document: Tensor | None, key_document: Tensor | None
    ) -> Tensor:
        """Return a bool tensor, True where a query sees a key, of the shape that the arguments broadcast to."""
        visible = query_position >= key_position
        if query_document is not None:
            visible = visible & (query_document == key_document)
        for modifier in self.mask_modifiers:
            visible = visible & modifier.visible(query_position, key_position)
        return visible
