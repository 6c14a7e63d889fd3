"""The modules of a model that only one stage of a pipeline holds: embeddings, blocks, and modules after the blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from titan_config import ConfigError
from torch import nn

from titan_parallel.sharding_plan.roles import Roles, inside


@dataclass
class StageModules:
    """Modules by name. All stages hold the modules that are in none of these fields.

    Later stages receive the outputs of embeddings as hidden states. Every block may read the outputs of other modules
    before the blocks: conditioning, position tables, an encoder.
    """

    embeddings: dict[str, nn.Module] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    after: dict[str, nn.Module] = field(default_factory=dict)
    """Modules defined after the blocks, in the order of definition, and the head wherever it is defined."""

    @classmethod
    def of(cls, model: nn.Module, roles: Roles, degree: int) -> StageModules:
        """Find the modules of the stages in `model`, for a pipeline of `degree` ranks.

        Raises ConfigError for a model without blocks, or with the same module at several blocks.
        """
        names = roles.named("block")
        if not names:
            raise ConfigError(
                f"pipeline_parallel_degree must be 1 for roles without a block, got {degree}. Give the role block to "
                "the layers."
            )
        blocks = {name: model.get_submodule(name) for name in names}
        if len(set(blocks.values())) < len(blocks):
            raise ConfigError(
                f"Blocks of a pipeline must be distinct modules, got {names[0].rpartition('.')[0]}, which contains the "
                "same module more than once. Set pipeline_parallel_degree to 1."
            )
        lookups = [name for name in roles.named("embedding") if not roles.options(name).get("between_blocks")]
        pieces = cls({name: model.get_submodule(name) for name in lookups}, blocks)
        cuts = frozenset((*blocks.values(), *pieces.embeddings.values()))
        num_blocks = 0
        for name, module in _walk("", model, cuts, set()):
            if module in cuts:
                num_blocks += name in blocks
                continue
            is_after = num_blocks == len(blocks) or (roles.head is not None and inside(roles.head, name))
            if is_after and any(True for _ in module.parameters()):
                pieces.after[name] = module
        return pieces


def _walk(
    prefix: str, module: nn.Module, cuts: frozenset[nn.Module], seen: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in `cuts` and the largest modules that contain none of them, each once, with their names."""
    for name, child in module.named_children():
        if child in cuts or cuts.isdisjoint(child.modules()):
            if child not in seen:
                seen.add(child)
                yield prefix + name, child
        else:
            yield from _walk(f"{prefix}{name}.", child, cuts, seen)


def skeleton(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of `module` on the meta device, with floating-point weights of `dtype` (None: unchanged)."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        own = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta", dtype=own), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)
