"""Context parallel of transformers' models: what one process computes, through their attention interface."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from titan_parallel import ParallelDims, check_parallel

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "use_cache": False,
}
ALTERNATING = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen3": ("Qwen3Config", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 5, "layer_types": ALTERNATING, "query_pre_attn_scalar": 8}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": 64}),
    "gemma2, capped scores": (
        "Gemma2Config",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "_attn_implementation": "eager",
        },
    ),
    "gpt-oss, sinks": (
        "GptOssConfig",
        {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 2, "_attn_implementation": "eager"},
    ),
    "llama, two rows of documents": ("LlamaConfig", {}),
    "mistral, a cache is filled": ("MistralConfig", {"sliding_window": 5, "use_cache": True}),
    "llama, padded": ("LlamaConfig", {}),
}


def build(family: str):
    name, changes = FAMILIES[family]
    small = {} if family == "gpt2" else SMALL
    config = getattr(transformers, name)(**{**small, **changes})
    config.use_cache = changes.get("use_cache", False)
    return lambda: transformers.AutoModelForCausalLM.from_config(config)


def roles(family: str) -> dict[str, str]:
    stack = "transformer.h.*" if family == "gpt2" else "model.layers.*"
    return {stack: "block", "lm_head": "head"}


def parallelism(**more) -> dict[str, ParallelDims.Config]:
    return {
        method: ParallelDims.Config(context_parallel_degree=2, context_parallel_method=method, **more)
        for method in ("gather", "ulysses", "ring")
    }


def make_batch(positions: list[torch.Tensor] | None = None, padding: torch.Tensor | None = None):
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, 1).index_fill(1, torch.tensor([15]), -100)
    inputs = {"input_ids": tokens}
    if positions is not None:
        inputs["position_ids"] = torch.stack(positions)
    if padding is not None:
        inputs["attention_mask"] = padding
        labels = labels.masked_fill(padding == 0, -100)
    return SimpleNamespace(
        inputs=inputs, targets={"labels": labels}, sequence_dims=dict.fromkeys([*inputs, "labels"], 1)
    )


PACKED = [torch.cat([torch.arange(7), torch.arange(9)]), torch.cat([torch.arange(3), torch.arange(12), torch.zeros(1)])]
BATCHES = {
    "llama, two rows of documents": make_batch([row.long() for row in PACKED]),
    "mistral, a cache is filled": make_batch([row.long() for row in PACKED]),
    "llama, padded": make_batch(padding=torch.tensor([[1] * 16, [1] * 11 + [0] * 5])),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_model_over_context_ranks_is_the_model(family):
    report = check_parallel(
        build(family),
        parallelism(data_parallel_shard_degree=1),
        roles=roles(family),
        batch=BATCHES.get(family, make_batch()),
        steps=1,
        num_microbatches=2,
    )
    report.raise_for_failure()
