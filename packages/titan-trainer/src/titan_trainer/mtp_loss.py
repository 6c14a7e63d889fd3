"""The loss of multi-token prediction (MTP): cross-entropy of the next token and of the one after it.

B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from titan_config import ConfigError, Configurable
from titan_parallel import per_token
from torch import Tensor

from titan_trainer.loss import CrossEntropy


@per_token
class MultiTokenPredictionLoss(Configurable):
    """The loss of the next token, plus `weight` times the loss of the token after it.

    Both sums are divided by the number of valid labels of the next token: DeepSeek-AI, "DeepSeek-V3 technical report"
    (2024), equations 24 and 25. For batches without `next_labels`, such as those of validation, it is the loss of the
    next token alone.
    """

    class Config(Configurable.Config):
        loss: CrossEntropy.Config = CrossEntropy.Config()
        """Loss of each of the two tokens."""

        weight: float = 0.3
        """Weight of the token after the next."""

        def validate(self) -> None:
            if not self.weight >= 0:
                raise ConfigError(f"MTP loss weight must be at least 0, got {self.weight}.")

    def __init__(self, config: Config) -> None:
        self.weight = config.weight
        self.loss: CrossEntropy = config.loss.build()

    def count(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the number of valid labels of the next token: an int64 scalar."""
        return self.loss.count(targets)

    def __call__(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss sum (fp32 or wider) and the number of valid labels of the next token.

        `hidden` is `[B, 2, T, D]`: the hidden states of the main model, then those of the MTP layer. `targets` has
        `labels` and `next_labels`, both `[B, T]`; without `next_labels`, `hidden` is `[B, T, D]`.
        """
        if "next_labels" not in targets:
            return self.loss(head, hidden, targets)
        main_BTD, mtp_BTD = hidden.unbind(1)
        main_sum, count = self.loss(head, main_BTD, targets)
        mtp_sum, _ = self.loss(head, mtp_BTD, {"labels": targets["next_labels"]})
        return main_sum + self.weight * mtp_sum, count
