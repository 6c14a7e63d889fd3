"""Group-limited routing."""

from __future__ import annotations

from typing import Literal

import torch
from titan_config import Configurable
from torch import Tensor


class ExpertGroups(Configurable):
    """Group-limited expert selection: a token uses experts of its best groups only (DeepSeek-AI, 2024).

    N tokens, E experts.
    """

    class Config(Configurable.Config):
        num_groups: int
        """Number of groups of consecutive experts, all of one size (n_group)."""

        num_kept: int
        """Number of groups from which the experts of a token are selected (topk_group)."""

        score: Literal["best", "sum of best two"]
        """Score of a group: its best expert score (DeepSeek-V2) or the sum of its best two (V3)."""

        def validate(self) -> None:
            if not 1 <= self.num_kept <= self.num_groups:
                raise ValueError(f"num_kept must be 1 to num_groups ({self.num_groups}), got {self.num_kept}.")

    def __init__(self, config: Config) -> None:
        self.config = config

    def limit(self, scores_NE: Tensor) -> Tensor:
        """Return the scores with those outside of the best groups of each token set to minus infinity."""
        groups = scores_NE.unflatten(1, (self.config.num_groups, -1))
        num_best = 1 if self.config.score == "best" else 2
        group_scores = groups.topk(num_best, dim=-1).values.sum(-1)
        kept = group_scores.topk(self.config.num_kept).indices
        is_kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, kept, True)
        return groups.masked_fill(~is_kept.unsqueeze(-1), -torch.inf).flatten(1)
