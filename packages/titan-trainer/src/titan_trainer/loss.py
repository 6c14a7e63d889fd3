"""Cross-entropy in chunks of tokens, so that the logits of a whole batch never exist at once.

B batch, T tokens, D width, N tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from titan_config import ConfigError, Configurable
from titan_parallel import cross_entropy, per_token
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@per_token
class CrossEntropy(Configurable):
    """The sum of -log p(label) over all valid labels, those that are not -100.

    A micro-batch of more than `chunk_tokens` tokens is split into chunks. The logits of each chunk are recomputed in
    the backward, so at most `chunk_tokens * V` logits exist at once. The head's weights are gathered once for all
    chunks.
    """

    class Config(Configurable.Config):
        chunk_tokens: int | None = 2048
        """Maximum number of tokens whose logits exist at once. None: all tokens of a micro-batch."""
        z_loss: float = 0.0
        """Weight of the z-loss, the squared log-sum-exp of each token's logits, which keeps logits small; 1e-5 in OLMo.
        The reported training loss includes it, the validation loss does not."""

        def validate(self) -> None:
            if not 0 <= self.z_loss < math.inf:
                raise ConfigError(f"z_loss must be finite and at least 0, got {self.z_loss}.", "z_loss")
            if self.chunk_tokens is not None and self.chunk_tokens < 1:
                raise ConfigError(f"chunk_tokens must be at least 1, or None for no chunks, got {self.chunk_tokens}.")

    ignore_index = -100

    def __init__(self, config: Config) -> None:
        self.chunk_tokens, self.z_loss = config.chunk_tokens, config.z_loss

    def count(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the number of valid labels: an int64 scalar."""
        return (targets["labels"] != self.ignore_index).sum()

    def __call__(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss sum (fp32 or wider) and the number of valid labels.

        `hidden` is `[B, T, D]`; `targets` has `labels [B, T]`.
        """
        labels_N = targets["labels"].flatten()
        hidden_ND = hidden.flatten(0, -2)
        num_chunks = -(-len(labels_N) // (self.chunk_tokens or len(labels_N)))
        if num_chunks == 1:
            return self._chunk_loss(head, hidden_ND, labels_N), self.count(targets)
        sums = [
            checkpoint(self._chunk_loss, head, chunk_ND, chunk_labels_N, use_reentrant=False)
            for chunk_ND, chunk_labels_N in zip(hidden_ND.chunk(num_chunks), labels_N.chunk(num_chunks), strict=True)
        ]
        return torch.stack(sums).sum(), self.count(targets)

    def _chunk_loss(self, head: Callable[[Tensor], Tensor], hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        z_loss = self.z_loss if torch.is_grad_enabled() else 0.0
        return cross_entropy(head(hidden_ND), labels_N, ignore_index=self.ignore_index, z_loss=z_loss)
