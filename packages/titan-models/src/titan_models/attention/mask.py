"""Which keys a query may see, described; attention cores build_mask the description in the form their kernel wants."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from titan_config import Configurable
from torch import Tensor


class MaskModifier(Configurable, abc.ABC):
    """Leaves out some of what a causal mask shows: `SlidingWindow`, `Chunks`, or one of your own."""

    @abc.abstractmethod
    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        """Whether queries see keys: bool, of the shape that the arguments, integers, broadcast to.

        Keys never stand behind their queries, nor in other documents: those are left out already.
        """


class SlidingWindow(MaskModifier):
    """A query sees itself and the keys just before."""

    class Config(MaskModifier.Config):
        size: int
        """Keys that a query sees."""

        def validate(self) -> None:
            if self.size < 1:
                raise ValueError(f"Got size {self.size}. A window is of keys. Set it to 1 or more.")

    def __init__(self, config: Config) -> None:
        self.size = config.size

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return query_position - key_position < self.size


class Chunks(MaskModifier):
    """A query sees the keys of its own chunk."""

    class Config(MaskModifier.Config):
        size: int
        """Positions in a chunk."""

        def validate(self) -> None:
            if self.size < 1:
                raise ValueError(f"Got size {self.size}. A chunk is of positions. Set it to 1 or more.")

    def __init__(self, config: Config) -> None:
        self.size = config.size

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return query_position // self.size == key_position // self.size


@dataclass(frozen=True)
class Mask:
    """A causal mask, and its intersections with documents and mask_modifiers.

    Queries and keys are described apart, by their places in the sequence and the documents they belong to, so that
    either may be any shard of it. B batch, T queries, S keys.
    """

    query_positions: Tensor
    """[B, T] integers: a query sees keys up to its own position."""

    key_positions: Tensor
    """[B, S] integers."""

    query_documents: Tensor | None = None
    """[B, T] integers: a query sees keys of its own document. None: a row is one document."""

    key_documents: Tensor | None = None
    """[B, S] integers; given when `query_documents` is."""

    mask_modifiers: tuple[MaskModifier, ...] = ()
    """A query sees the keys that all of them leave."""

    @staticmethod
    def causal(
        positions: Tensor, documents: Tensor | None = None, mask_modifiers: tuple[MaskModifier, ...] = ()
    ) -> Mask:
        """The mask of tokens that attend to each other: `positions` and `documents` `[B, T]`.

        Positions rise along a document; without documents they rise along the row.
        """
        return Mask(positions, positions, documents, documents, mask_modifiers)

    def __post_init__(self) -> None:
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError(
                "Got documents of queries or of keys alone. They are compared with each other. Give both or neither."
            )

    @property
    def only_causal(self) -> bool:
        """Whether the queries are the keys, in order, and nothing but order mask_modifiers what they see."""
        return self.query_positions is self.key_positions and self.query_documents is None and not self.mask_modifiers

    def visible(self) -> Tensor:
        """[B, T, S] bool: whether a query sees a key."""
        queries, keys = (..., slice(None), None), (..., None, slice(None))
        query_documents = None if self.query_documents is None else self.query_documents[queries]
        key_documents = None if self.key_documents is None else self.key_documents[keys]
        return self.rule(self.query_positions[queries], self.key_positions[keys], query_documents, key_documents)

    def rule(
        self, query_position: Tensor, key_position: Tensor, query_document: Tensor | None, key_document: Tensor | None
    ) -> Tensor:
        """Whether queries see keys: bool, of the shape that the arguments broadcast to. All masks are made of this."""
        visible = query_position >= key_position
        if query_document is not None:
            visible = visible & (query_document == key_document)
        for limit in self.mask_modifiers:
            visible = visible & limit.visible(query_position, key_position)
        return visible
