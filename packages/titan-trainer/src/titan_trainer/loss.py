"""Cross-entropy over the vocabulary, taken in chunks so that the logits of a whole batch never exist at once.

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
    """The sum of -log p(label) over all labels that are not -100.

    A batch of more than `chunk_tokens` tokens is cut into chunks; each chunk's logits are made again in the backward,
    so the memory for logits is `chunk_tokens * V`, whatever the batch. The chunks share one gathering of the head.
    """

    class Config(Configurable.Config):
        chunk_tokens: int | None = 2048
        """Tokens whose logits exist at once. None: all."""
        z_loss: float = 0.0
        """Factor of the square of each token's log-sum-exp of logits, which is added to the loss and keeps logits
        small; 1e-5 in OLMo. The training loss that is reported holds it, that of validations does not."""

        def validate(self) -> None:
            if not 0 <= self.z_loss < math.inf:
                raise ConfigError(f"z_loss must be a finite number, 0 or more, got {self.z_loss}.", "z_loss")
            if self.chunk_tokens is not None and self.chunk_tokens < 1:
                raise ConfigError(
                    f"Got chunk_tokens {self.chunk_tokens}. A chunk holds at least one token. "
                    "Set loss.chunk_tokens to a positive number, or to None for no chunks."
                )

    ignore_index = -100

    def __init__(self, config: Config) -> None:
        self.chunk_tokens, self.z_loss = config.chunk_tokens, config.z_loss

    def count(self, targets: Mapping[str, Tensor]) -> Tensor:
        """How many labels count: an int64 scalar."""
        return (targets["labels"] != self.ignore_index).sum()

    def __call__(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`hidden [B, T, D]` and `labels [B, T]` to the loss's sum (fp32 or wider) and its count."""
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
