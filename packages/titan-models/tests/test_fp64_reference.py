"""References of transformers compute entirely in fp64, even where their code requests fp32."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
FAMILIES = {
    "llama": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT | GROUPS | {"num_key_value_heads": 4, "head_dim": 4},
    "deepseek_v2": LATENT | GROUPS | {"num_key_value_heads": 4},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"sliding_window": 3},
}


class Narrow(TorchDispatchMode):
    """Counts the operators with inputs or outputs of a lower precision than fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype is not torch.float64:
                self.found[str(function)] += 1
        return result


def operators_in_fp32(model: nn.Module, context: Any, tokens: Tensor) -> Counter[str]:
    with Narrow() as narrow:
        with context:
            logits = model(tokens)
            logits = logits if isinstance(logits, Tensor) else logits.logits
        functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    return narrow.found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_reference_computes_entirely_in_fp64(family: str, in_fp64: Any, fp64_model: Any) -> None:
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family], use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    model = fp64_model(model)
    assert operators_in_fp32(model, in_fp64(), tokens) == Counter()
    assert operators_in_fp32(model.double(), torch.enable_grad(), tokens)  # which the check detects
    assert torch.get_default_dtype() is torch.float32


class Islands(nn.Module):
    """All ways of requesting fp32 that the families use, and some more."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8, dtype=torch.bfloat16)
        self.router = nn.Parameter(torch.randn(4, 8, dtype=torch.float32))
        self.register_buffer("bias", torch.rand(4, dtype=torch.float32), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        scores = functional.linear(x.type(torch.float32), self.router.float()) + self.bias.to(torch.float32)
        scores = scores.softmax(-1, dtype=torch.float32) + torch.zeros(4) + torch.linspace(0.1, 0.4, 4)
        scale = torch.ones(1, dtype=torch.float32, device=x.device) + torch.tensor(0.5)
        return torch.cat([scores.to(dtype=torch.float) * scale] * 13, -1)[..., :50]


def test_every_request_for_fp32_gives_fp64(in_fp64: Any, fp64_model: Any) -> None:
    tokens = torch.arange(6)[None]
    model = Islands()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert operators_in_fp32(Islands().double(), torch.enable_grad(), tokens)
    assert operators_in_fp32(fp64_model(model), in_fp64(), tokens) == Counter()
    assert all(torch.equal(weights[name].double(), tensor) for name, tensor in model.state_dict().items())


def test_weights_rounded_on_loading_are_restored_from_the_state_dict(fp64_model: Any) -> None:
    model = Islands()
    exact = {name: torch.randn(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    model.load_state_dict(exact)
    assert not torch.equal(model.router.double(), exact["router"])
    model = fp64_model(model, exact)
    assert all(torch.equal(parameter, exact[name]) for name, parameter in model.named_parameters())
    with pytest.raises(AssertionError, match=r"loaded in lower precision, got none of.*router"):
        fp64_model(Islands(), {"words.weight": exact["words.weight"]})
