"""Recognize models of transformers."""

from __future__ import annotations

import sys

from torch import nn


def is_transformers_model(model: nn.Module) -> bool:
    """Return whether `model` is a `PreTrainedModel`, without importing transformers."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)
