"""Roles of Hugging Face models: from the tensor-parallel plan that a model declares, and from what its parts look like.

No import of `transformers`: a model brings along all that is asked of it.
"""

from __future__ import annotations

import re
from typing import Any

from titan_config import ConfigError
from torch import nn

from titan_parallel._transformers import is_transformers_model
from titan_parallel.probe.token_probe import TokenProbe
from titan_parallel.sharding_plan.roles import Roles, RoleTable
from titan_parallel.sharding_plan.unit_roles import fsdp_roles

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
"""config.model_type -> the plan that a model which declares none might have declared, in the same words."""

REFUSED = {
    "bloom": "adds the stream inside its attention, and biases scores by the place of a head among all (alibi)",
    "falcon": "computes one layout of fused heads of three, and position biases (alibi) for all heads at once",
    "mpt": "biases attention scores by the place of a head among all (alibi)",
}
"""config.model_type -> what no table of roles can say."""

ROLE_OF_WORD = {
    "colwise": "colwise",
    "colwise_gather_output": "colwise",
    "packed_colwise": "colwise",
    "rowwise": "rowwise",
    "rowwise_split_input": "rowwise",
}
"""Words of plans that are roles. Others name what may stay whole, and what belongs to experts."""

SIZES = {
    "num_heads": "num_heads",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_key_value_groups": "num_heads_per_kv_head",
    "split_size": "features",
}
"""Attributes in which attention modules keep sizes -> what they count."""


def roles_of(model: nn.Module) -> RoleTable:
    """Return the table of roles of a language model of `transformers`: a plain dictionary, to print and to change.

    Experts are left whole on tensor ranks. Raises ConfigError for a model that declares no plan and is not in `PLANS`,
    naming the lines to write, and for one that cannot be split, with the reason. `titan_parallel.fsdp_roles` is for any
    model that is only sharded over data ranks.
    """
    if not is_transformers_model(model):
        raise ConfigError(
            f"roles_of must be given a model of transformers, got a {type(model).__name__}. Use "
            "titan_parallel.fsdp_roles(model) to shard it over data ranks, or write its table: docs/parallel.md."
        )
    return _Table(model).roles()


class _Table:
    """Reads a model; every name in here is one of its module names with `*` for numbers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = model.config.get_text_config()
        self._modules: dict[str, nn.Module] = {}  # the first of each kind
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
        for pattern, word in plan.items():
            parent = pattern.rpartition(".")[0]
            if parent != stack and self._beside(parent, plan)[0] == pattern:
                table.update(dict.fromkeys(self._parents(pattern), self._region(parent, plan)))
                table.update(self._norms(parent, plan))
            role, options = ROLE_OF_WORD[word], self._projection(pattern, plan)
            if parent == stack:
                options["border"] = True
            table[pattern] = (role, options) if options else role
        if (head := self._end("output")) is not None:
            table[self._names[head]] = "head" if self._ends_with(head) else ("head", {"takes_loss": False})
        return table

    def _end(self, which: str) -> nn.Module | None:
        """The table of tokens ("input") or the head ("output"), where the model has one and says which."""
        try:
            module: nn.Module | None = getattr(self._model, f"get_{which}_embeddings")()
        except (NotImplementedError, AttributeError):  # of models for images and sounds
            return None
        return module if module in self._names else None

    def _ends_with(self, head: nn.Module) -> bool:
        """Return whether the logits are what the head returns: nothing scales, caps or slices them afterwards."""
        return TokenProbe(self._model, Roles(self._model, {})).ends_with(self._names[head])

    def _plan(self) -> dict[str, str]:
        """The projections inside blocks and what the plan calls them."""
        kind = self._config.model_type
        base = self._names[self._model.base_model]
        known = {f"{base}.{pattern}" if base else pattern: word for pattern, word in PLANS.get(kind, {}).items()}
        plan = {
            pattern: word
            for pattern, word in (known or getattr(self._model, "_tp_plan", None) or {}).items()
            if word in ROLE_OF_WORD and "*" in pattern and pattern in self._modules and "experts." not in pattern
        }
        plan = {pattern: word for pattern, word in plan.items() if self._is_paired(pattern, plan)}
        if kind in REFUSED:
            raise ConfigError(
                f"Got a {type(self._model).__name__}, which {REFUSED[kind]}. Tensor ranks have some of the heads each, "
                f"so it cannot be split over them. Shard it over data ranks, with fsdp_roles(model): "
                f"{fsdp_roles(self._model)}."
            )
        if not plan:
            raise ConfigError(
                f"Got a {type(self._model).__name__}, which declares no tensor-parallel plan and is not one of "
                f"{', '.join(PLANS)}. Its roles have to be said. {self._advice()}"
            )
        return plan

    def _is_paired(self, pattern: str, plan: dict[str, str]) -> bool:
        """Return whether features that a plan splits beside a projection are summed there too; others stay whole."""
        roles = {ROLE_OF_WORD[plan[name]] for name in self._beside(pattern.rpartition(".")[0], plan)}
        return roles == {"colwise", "rowwise"}

    def _parents(self, pattern: str) -> list[str]:
        """The parents of a projection as one pattern, or by name where layers differ (some have experts there)."""
        parent = pattern.rpartition(".")[0]
        alike = [name for name in self._names.values() if _starred(name) == parent]
        return [parent] if alike == self._owners(pattern) else self._owners(pattern)

    def _owners(self, pattern: str) -> list[str]:
        """The names of the modules that have such a projection."""
        return [name.rpartition(".")[0] for name in self._names.values() if _starred(name) == pattern]

    def _region(self, region: str, plan: dict[str, str]) -> Any:
        """Attention keeps sizes as attributes; one that does not may read them from the config that all share."""
        if not self._is_attention(region):
            return "region"
        owner = self._owners(self._beside(region, plan)[0])[0]  # layers may have other attention in the same place
        own = vars(self._model.get_submodule(owner))
        sizes = {name: what for name, what in SIZES.items() if type(own.get(name)) is int}
        packed = any(self._is_packed(name, plan) for name in self._beside(region, plan))
        if packed and "num_heads" not in sizes.values():
            sizes["config.num_attention_heads"] = "num_heads"
        return ("region", {"set": sizes}) if sizes else "region"

    def _projection(self, pattern: str, plan: dict[str, str]) -> dict[str, Any]:
        module, role = self._modules[pattern], ROLE_OF_WORD[plan[pattern]]
        options: dict[str, Any] = {}
        if type(module).__name__ == "Conv1D":
            options["transposed"] = True
            if role == "colwise":
                options["set"] = {"nf": "features"}
        if role == "colwise" and self._is_attention(pattern.rpartition(".")[0]):
            options.update(self._heads(pattern, plan))
        elif role == "colwise" and self._is_packed(pattern, plan):
            options["packed"] = self._num_features(pattern) // self._taken(pattern, plan)
        return options

    def _heads(self, pattern: str, plan: dict[str, str]) -> dict[str, int]:
        """Whose heads a projection of an attention holds. (Configs may count key-value heads that no module has.)"""
        count, taken, num_heads = self._num_features(pattern), self._taken(pattern, plan), self._num_heads()
        width = taken // num_heads
        if self._is_packed(pattern, plan):
            num_kv_heads = (count - taken) // 2 // width
            packed = {"packed": 3, "num_heads": num_heads}
            return packed if num_kv_heads == num_heads else {**packed, "num_kv_heads": num_kv_heads}
        if count < taken:
            return {"num_kv_heads": count // width}
        return {"num_heads": num_heads} if count == taken else {"packed": 1, "num_heads": num_heads}

    def _norms(self, region: str, plan: dict[str, str]) -> dict[str, Any]:
        """Norms over all heads: for these a plan gathers a projection, unless several lie in it side by side."""
        gathered = [name for name in self._beside(region, plan) if plan[name] == "colwise_gather_output"]
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
        """Return whether several projections lie side by side: then a plan gathers more features than are taken."""
        gathered = plan[pattern] in ("packed_colwise", "colwise_gather_output")
        return gathered and self._num_features(pattern) > self._taken(pattern, plan)

    def _taken(self, pattern: str, plan: dict[str, str]) -> int:
        """The features that the rowwise part beside a projection takes."""
        region = pattern.rpartition(".")[0]
        rowwise = next(name for name in self._beside(region, plan) if ROLE_OF_WORD[plan[name]] == "rowwise")
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

    def _beside(self, region: str, plan: dict[str, str]) -> list[str]:
        return [pattern for pattern in plan if pattern.rpartition(".")[0] == region]

    def _names_of(self, kind: type[nn.Module]) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in self._model.named_modules() if isinstance(module, kind)]

    def _advice(self) -> str:
        table = fsdp_roles(self._model)
        linear = dict.fromkeys(_starred(name) for name, _ in self._names_of(nn.Linear))
        within = [name for name in linear if any(name.startswith(block + ".") for block in table)]
        return (
            f"To shard it over data ranks, use titan_parallel.fsdp_roles(model): {table}. For tensor ranks add to it "
            f"the role region for the parents of projections, and colwise or rowwise for these: "
            f"{', '.join(within) or 'none was found'}."
        )


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
