"""Inputs of a model's forward, recognized by the names of its parameters."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from titan_parallel._transformers import is_transformers_model
from titan_parallel.sharding_plan.roles import Roles

TOKENS = ("tokens", "input_ids", "ids")
"""Names of token ids."""
POSITIONS = ("positions", "position_ids")
DOCUMENTS = ("document_ids",)


def named_inputs(model: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Return {name: "tokens", "positions" or "documents"}, and the required parameters of the forward.

    A single required parameter of another name is taken for tokens.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    known = {"tokens": TOKENS, "positions": POSITIONS, "documents": DOCUMENTS}
    found = {p.name: kind for p in parameters for kind, names in known.items() if p.name in names}
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) == 1:
        found.setdefault(needed[0], "tokens")
    return found, needed


def vocabulary(model: nn.Module, roles: Roles) -> int | None:
    """Return the vocabulary size: the rows of the head or of the first embedding, else of the largest embedding."""
    names = [*roles.named("head"), *roles.named("embedding")]
    matrices = [model.get_submodule(name)._parameters.get("weight") for name in names]
    sizes = [len(matrix) for matrix in matrices if matrix is not None]
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return sizes[0] if sizes else max(tables, default=None)


def synthetic_inputs(model: nn.Module, roles: Roles, length: int) -> dict[str, Tensor] | None:
    """Return three sequences of `length` token ids, with positions and document ids where the model takes them.

    None for a model that takes something else. The sequence is dim 1 of each tensor. A model of transformers also gets
    an attention mask without padding.
    """
    names, needed = named_inputs(model)
    size = vocabulary(model, roles)
    if size is None or "tokens" not in names.values() or not names.keys() >= set(needed):
        return None
    low = 3 if size > 4 else 0  # the first ids are often special tokens such as padding
    ids = torch.randint(low, min(size, 50), (3, length), generator=torch.Generator().manual_seed(0))
    kinds = {"tokens": ids, "positions": torch.arange(length).repeat(3, 1), "documents": torch.zeros_like(ids)}
    inputs = {name: kinds[kind] for name, kind in names.items()}
    return inputs | ({"attention_mask": torch.ones_like(ids)} if is_transformers_model(model) else {})
