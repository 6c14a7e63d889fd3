"""Which keys a query may see, described; attention cores realise the description in the form their kernel wants."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """A causal mask, and its intersections with documents, a sliding window and chunks.

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

    window: int | None = None
    """A query sees this many keys, itself and those just before."""

    chunk: int | None = None
    """A query sees keys of its own chunk of this many positions."""

    @staticmethod
    def causal(
        positions: Tensor, documents: Tensor | None = None, window: int | None = None, chunk: int | None = None
    ) -> Mask:
        """The mask of tokens that attend to each other: `positions` and `documents` `[B, T]`.

        Positions rise along a document; without documents they rise along the row.
        """
        return Mask(positions, positions, documents, documents, window, chunk)

    def __post_init__(self) -> None:
        if (self.query_documents is None) != (self.key_documents is None):
            raise ValueError(
                "Got documents of queries or of keys alone. They are compared with each other. Give both or neither."
            )
        for name in ("window", "chunk"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"Got {name} {size}. It counts keys. Set it to 1 or more, or to None for no {name}.")

    @property
    def only_causal(self) -> bool:
        """Whether the queries are the keys, in order, and nothing but order limits what they see."""
        same = self.query_positions is self.key_positions
        return same and self.query_documents is None and self.window is None and self.chunk is None

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
        if self.window is not None:
            visible = visible & (query_position - key_position < self.window)
        if self.chunk is not None:
            visible = visible & (query_position // self.chunk == key_position // self.chunk)
        return visible
