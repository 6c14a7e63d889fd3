"""Roles of Hugging Face models, from the tensor-parallel plan that a model declares and from its modules.

This file does not import `transformers`: everything it needs is in the model itself.
"""

from __future__ import annotations

import re
from typing import Any

from titan_config import ConfigError
from torch import nn

from titan_parallel._transformers import is_transformers_model
from titan_parallel.probe.model_probe import ModelProbe
from titan_parallel.sharding_plan.roles import Roles, RoleTable
from titan_parallel.sharding_plan.unit_roles import fsdp_roles

__all__ = ["roles_of"]

PLANS: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "packed_colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "gpt_neo": {
        "h.*.attn.attention.q_proj": "colwise",
        "h.*.attn.attention.k_proj": "colwise",
        "h.*.attn.attention.v_proj": "colwise",
        "h.*.attn.attention.out_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
    "gptj": {
        "h.*.attn.q_proj": "colwise",
        "h.*.attn.k_proj": "colwise",
        "h.*.attn.v_proj": "colwise",
        "h.*.attn.out_proj": "rowwise",
        "h.*.mlp.fc_in": "colwise",
        "h.*.mlp.fc_out": "rowwise",
    },
    "opt": {
        "decoder.layers.*.self_attn.q_proj": "colwise",
        "decoder.layers.*.self_attn.k_proj": "colwise",
        "decoder.layers.*.self_attn.v_proj": "colwise",
        "decoder.layers.*.self_attn.out_proj": "rowwise",
        "decoder.layers.*.fc1": "colwise",
        "decoder.layers.*.fc2": "rowwise",
    },
}
"""config.model_type -> a plan in the style of `_tp_plan`, for models of transformers that declare none."""

REFUSED = {
    "bloom": "adds the residual stream inside its attention, and its position biases (alibi) depend on the head index",
    "falcon": "computes one of its three layouts of fused heads, and position biases (alibi), for all heads at once",
    "mpt": "adds position biases (alibi) that depend on the head index",
}
"""config.model_type -> the reason why no table of roles can split the model over tensor-parallel ranks."""

ROLE_OF_STYLE = {
    "colwise": "colwise",
    "colwise_gather_output": "colwise",
    "packed_colwise": "colwise",
    "rowwise": "rowwise",
    "rowwise_split_input": "rowwise",
}
"""Styles of a `_tp_plan` -> role. Other styles are for modules that may stay whole, and for experts."""

SIZES = {
    "num_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_key_value_groups": "num_heads_per_kv_head",
    "split_size": "features",
}
"""Attributes of attention modules that hold sizes -> the quantity that each counts."""


def roles_of(model: nn.Module) -> RoleTable:
    """Return the table of roles of a language model of `transformers`: a plain dictionary that can be changed.

    Experts are not split over tensor-parallel ranks. Raises ConfigError for a model that declares no tensor-parallel
    plan and is not in `PLANS`, with the lines to write, and for a model that cannot be split, with the reason. To only
    shard a model over data-parallel ranks, use `titan_parallel.fsdp_roles`.
    """
    if not is_transformers_model(model):
        raise ConfigError(
            f"roles_of must be given a model of transformers, got a {type(model).__name__}. Use "
            "titan_parallel.fsdp_roles(model) to shard it over data-parallel ranks, or write its table of roles: "
            "docs/concepts/roles.md."
        )
    return _Table(model).roles()


class _Table:
    """The table of roles of one model. Module names in here have `*` in place of numbers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = model.config.get_text_config()
        self._modules: dict[str, nn.Module] = {}  # the first module of each starred name
        for name, module in model.named_modules():
            self._modules.setdefault(_starred(name), module)
        self._names = {module: name for name, module in model.named_modules()}

    def roles(self) -> RoleTable:
        plan = self._plan()
        stack = next(iter(plan)).partition(".*")[0] + ".*"
        table: dict[str, Any] = {}
        for module, role in ((self._end("input"), "embedding"), (stack, "block")):
            if module is not None:
                table[module if isinstance(module, str) else self._names[module]] = role
        for pattern, style in plan.items():
            parent = pattern.rpartition(".")[0]
            if parent != stack and self._siblings(parent, plan)[0] == pattern:
                table.update(dict.fromkeys(self._parents(pattern), self._region(parent, plan)))
                table.update(self._norms(parent, plan))
            role, options = ROLE_OF_STYLE[style], self._projection(pattern, plan)
            if parent == stack:
                options["border"] = True
            table[pattern] = (role, options) if options else role
        if (head := self._end("output")) is not None:
            table[self._names[head]] = "head" if self._ends_with(head) else ("head", {"takes_loss": False})
        return table

    def _end(self, which: str) -> nn.Module | None:
        """Return the token embedding ("input") or the head ("output") if the model has and names one, else None."""
        try:
            module: nn.Module | None = getattr(self._model, f"get_{which}_embeddings")()
        except (NotImplementedError, AttributeError):  # raised by vision and audio models
            return None
        return module if module in self._names else None

    def _ends_with(self, head: nn.Module) -> bool:
        """Return whether the logits are the output of the head, without later scaling, soft-capping or slicing."""
        return ModelProbe(self._model, Roles(self._model, {})).ends_with(self._names[head])

    def _plan(self) -> dict[str, str]:
        """Return `{projection: style}` for the projections in blocks. Raises ConfigError if there are none."""
        kind = self._config.model_type
        base = self._names[self._model.base_model]
        known = {f"{base}.{pattern}" if base else pattern: style for pattern, style in PLANS.get(kind, {}).items()}
        plan = {
            pattern: style
            for pattern, style in (known or getattr(self._model, "_tp_plan", None) or {}).items()
            if style in ROLE_OF_STYLE and "*" in pattern and pattern in self._modules and "experts." not in pattern
        }
        plan = {pattern: style for pattern, style in plan.items() if self._is_paired(pattern, plan)}
        if kind in REFUSED:
            raise ConfigError(
                "A model must be able to compute its attention heads separately for tensor parallelism, got a "
                f"{type(self._model).__name__}, which {REFUSED[kind]}. Shard it over data-parallel ranks instead, with "
                f"titan_parallel.fsdp_roles(model): {fsdp_roles(self._model)}."
            )
        if not plan:
            raise ConfigError(
                f"A model must declare a tensor-parallel plan (_tp_plan) or be one of {', '.join(PLANS)}, got a "
                f"{type(self._model).__name__}. {self._advice()}"
            )
        return plan

    def _is_paired(self, pattern: str, plan: dict[str, str]) -> bool:
        """Return whether the parent of a projection has both colwise and rowwise ones; other projections stay whole."""
        roles = {ROLE_OF_STYLE[plan[name]] for name in self._siblings(pattern.rpartition(".")[0], plan)}
        return roles == {"colwise", "rowwise"}

    def _parents(self, pattern: str) -> list[str]:
        """Return the parents of a projection as one pattern, or by name if only some of the layers have it."""
        parent = pattern.rpartition(".")[0]
        alike = [name for name in self._names.values() if _starred(name) == parent]
        return [parent] if alike == self._owners(pattern) else self._owners(pattern)

    def _owners(self, pattern: str) -> list[str]:
        """Return the names of the modules that have such a projection."""
        return [name.rpartition(".")[0] for name in self._names.values() if _starred(name) == pattern]

    def _region(self, region: str, plan: dict[str, str]) -> Any:
        """Return the role region, for attention with the option `set`: the attributes that hold sizes.

        Packed attention without such an attribute reads the number of heads from the shared config.
        """
        if not self._is_attention(region):
            return "region"
        owner = self._owners(self._siblings(region, plan)[0])[0]  # other layers may have attention of another kind here
        own = vars(self._model.get_submodule(owner))
        sizes = {name: what for name, what in SIZES.items() if type(own.get(name)) is int}
        packed = any(self._is_packed(name, plan) for name in self._siblings(region, plan))
        if packed and "num_heads" not in sizes.values():
            sizes["config.num_attention_heads"] = "num_heads"
        return ("region", {"set": sizes}) if sizes else "region"

    def _projection(self, pattern: str, plan: dict[str, str]) -> dict[str, Any]:
        module, role = self._modules[pattern], ROLE_OF_STYLE[plan[pattern]]
        options: dict[str, Any] = {}
        if type(module).__name__ == "Conv1D":
            options["transposed"] = True
            if role == "colwise":
                options["set"] = {"nf": "features"}
        if role == "colwise" and self._is_attention(pattern.rpartition(".")[0]):
            options.update(self._heads(pattern, plan))
        elif role == "colwise" and self._is_packed(pattern, plan):
            options["packed"] = self._num_features(pattern) // self._num_rowwise_features(pattern, plan)
        return options

    def _heads(self, pattern: str, plan: dict[str, str]) -> dict[str, int]:
        """Return the options that describe the heads of a projection of attention.

        They follow from the shapes of the weights: a config may have a number of key-value heads that no module uses.
        """
        count, taken, num_heads = (
            self._num_features(pattern),
            self._num_rowwise_features(pattern, plan),
            self._num_heads(),
        )
        width = taken // num_heads
        if self._is_packed(pattern, plan):
            num_kv_heads = (count - taken) // 2 // width
            packed = {"packed": 3, "num_heads": num_heads}
            return packed if num_kv_heads == num_heads else {**packed, "num_kv_heads": num_kv_heads}
        if count < taken:
            return {"num_kv_heads": count // width}
        return {"num_heads": num_heads} if count == taken else {"packed": 1, "num_heads": num_heads}

    def _norms(self, region: str, plan: dict[str, str]) -> dict[str, Any]:
        """Return the norms over all heads of a region, with their options.

        If there is such a norm, the plan gathers the output of the projection before it ("colwise_gather_output"). For
        packed projections this style means something else.
        """
        gathered = [name for name in self._siblings(region, plan) if plan[name] == "colwise_gather_output"]
        if not self._is_attention(region) or any(self._is_packed(name, plan) for name in gathered):
            return {}
        heads = {self._num_features(name): self._heads(name, plan) for name in gathered}
        norms = {}
        for name, module in self._modules.items():
            weight = module._parameters.get("weight")
            if name.startswith(region + ".") and weight is not None and weight.dim() == 1 and weight.numel() in heads:
                norms[name] = ("norm", heads[weight.numel()])
        return norms

    def _is_packed(self, pattern: str, plan: dict[str, str]) -> bool:
        """Return whether several projections are packed in one: the plan gathers more features than rowwise takes."""
        gathered = plan[pattern] in ("packed_colwise", "colwise_gather_output")
        return gathered and self._num_features(pattern) > self._num_rowwise_features(pattern, plan)

    def _num_rowwise_features(self, pattern: str, plan: dict[str, str]) -> int:
        """Return the number of input features of the rowwise projection beside a projection."""
        region = pattern.rpartition(".")[0]
        rowwise = next(name for name in self._siblings(region, plan) if ROLE_OF_STYLE[plan[name]] == "rowwise")
        module = self._modules[rowwise]
        return module.get_parameter("weight").size(0 if type(module).__name__ == "Conv1D" else 1)

    def _num_features(self, pattern: str) -> int:
        module = self._modules[pattern]
        return module.get_parameter("weight").size(1 if type(module).__name__ == "Conv1D" else 0)

    def _num_heads(self) -> int:
        num_heads: int = self._config.num_attention_heads
        return num_heads

    def _is_attention(self, region: str) -> bool:
        return "attention" in type(self._modules[region]).__name__.lower()

    def _siblings(self, region: str, plan: dict[str, str]) -> list[str]:
        return [pattern for pattern in plan if pattern.rpartition(".")[0] == region]

    def _names_of(self, kind: type[nn.Module]) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self._model.named_modules() if isinstance(module, kind)]

    def _advice(self) -> str:
        table = fsdp_roles(self._model)
        linear = dict.fromkeys(_starred(name) for name, _ in self._names_of(nn.Linear))
        within = [name for name in linear if any(name.startswith(block + ".") for block in table)]
        return (
            f"To shard it over data-parallel ranks, use titan_parallel.fsdp_roles(model): {table}. For tensor "
            f"parallelism, add the role region for the parents of projections, and colwise or rowwise for these "
            f"projections: {', '.join(within) or 'none found'}."
        )


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
