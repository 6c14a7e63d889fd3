"""The loss of models that predict the token after next, too.

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
    """The loss of the next token, and `weight` times that of the token after it.

    Both sums are divided by the same count, that of labels: DeepSeek-AI, "DeepSeek-V3 technical report" (2024),
    equations 24 and 25. For batches that do not look ahead, as those of validation, it is the loss of the next token.
    """

    class Config(Configurable.Config):
        loss: CrossEntropy.Config = CrossEntropy.Config()
        """Of either token."""

        weight: float = 0.3
        """How much the token after next counts."""

        def validate(self) -> None:
            if not self.weight >= 0:
                raise ConfigError(
                    f"Got weight {self.weight}. The loss of the token after next counts so much. Set loss.weight to 0 "
                    "or more, such as 0.3."
                )

    def __init__(self, config: Config) -> None:
        self.weight = config.weight
        self.loss: CrossEntropy = config.loss.build()

    def count(self, targets: Mapping[str, Tensor]) -> Tensor:
        """How many labels count: an int64 scalar."""
        return self.loss.count(targets)

    def __call__(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`hidden [B, 2, T, D]`, `labels` and `next_labels` `[B, T]` to a sum (fp32 or wider) and a count."""
        if "next_labels" not in targets:
            return self.loss(head, hidden, targets)
        own_BTD, ahead_BTD = hidden.unbind(1)
        loss_sum, count = self.loss(head, own_BTD, targets)
        ahead_sum, _ = self.loss(head, ahead_BTD, {"labels": targets["next_labels"]})
        return loss_sum + self.weight * ahead_sum, count
