"""Routing limited to a few groups of experts."""

from __future__ import annotations

from typing import Literal

import torch
from titan_config import Configurable
from torch import Tensor


class ExpertGroups(Configurable):
    """Of the groups that experts are in, a token uses the best few (DeepSeek-AI, 2024). N tokens, E experts."""

    class Config(Configurable.Config):
        num_groups: int
        """Groups, of as many neighboring experts each."""

        num_kept: int
        """Groups that a token's experts come from."""

        score: Literal["best", "sum of best two"]
        """What a group is judged by: the scores of its experts, as DeepSeek-V2 and as V3 do."""

        def validate(self) -> None:
            if not 1 <= self.num_kept <= self.num_groups:
                raise ValueError(
                    f"Got num_kept {self.num_kept} of num_groups {self.num_groups}. A token keeps some of the groups. "
                    f"Set num_kept to 1 to {max(self.num_groups, 1)}."
                )

    def __init__(self, config: Config) -> None:
        self.config = config

    def limit(self, scores_NE: Tensor) -> Tensor:
        """The scores of experts in the token's best groups; minus infinity for all others."""
        groups = scores_NE.unflatten(1, (self.config.num_groups, -1))
        num_judged = 1 if self.config.score == "best" else 2
        judged = groups.topk(num_judged, dim=-1).values.sum(-1)
        kept = torch.zeros_like(judged, dtype=torch.bool).scatter_(1, judged.topk(self.config.num_kept).indices, True)
        return groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1)
