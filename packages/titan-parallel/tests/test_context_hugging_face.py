"""Context parallelism of transformers models, through their attention interface, equals one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import FullActivationCheckpoint, ParallelDims, check_parallel, parallelize, per_token
from titan_parallel.context_parallel import transformers_attention as hugging_face_attention

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
    "llama, documents": ("LlamaConfig", {}),
    "mistral, a cache is filled": ("MistralConfig", {"sliding_window": 5, "use_cache": True}),
    "llama, padded": ("LlamaConfig", {}),
}


def build(family: str):
    name, changes = FAMILIES[family]
    small = {} if family == "gpt2" else SMALL
    config = getattr(transformers, name)(**{**small, **changes})
    config.use_cache = changes.get("use_cache", False)
    config._experts_implementation = "eager"  # grouped matrix products do not support fp64
    return lambda: transformers.AutoModelForCausalLM.from_config(config)


def roles(family: str) -> dict[str, str]:
    stack = "transformer.h.*" if family == "gpt2" else "model.layers.*"
    scales_logits = family.startswith(("granite", "gemma2"))  # the loss must be computed after the scaling
    return {stack: "block"} if scales_logits else {stack: "block", "lm_head": "head"}


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
    "llama, documents": make_batch([row.long() for row in PACKED]),
    "mistral, a cache is filled": make_batch([row.long() for row in PACKED]),
    "llama, padded": make_batch(padding=torch.tensor([[1] * 16, [1] * 11 + [0] * 5])),
}


IN_FULL = {"llama", "qwen3", "olmo2", "granite", "phi3", "mistral", "llama, padded", "gemma2, capped scores"}


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.full] * (family in IN_FULL)) for family in FAMILIES]
)
def test_transformers_models_equal_one_process(family):
    report = check_parallel(
        build(family),
        parallelism(data_parallel_shard_degree=1),
        roles=roles(family),
        batch=BATCHES.get(family, make_batch()),
        steps=1,
        num_microbatches=1,
    )
    report.raise_for_failure()


def test_with_tensor_parallel_and_activation_checkpointing():
    def region(name: str, wide: tuple[str, ...], narrow: str) -> dict:
        return {name: "region", f"{name}.{narrow}": "rowwise"} | {f"{name}.{part}": "colwise" for part in wide}

    table = roles("llama") | {"model.embed_tokens": "embedding"}
    table |= region("model.layers.*.self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj")
    table |= region("model.layers.*.mlp", ("gate_proj", "up_proj"), "down_proj")
    report = check_parallel(
        build("llama"),
        parallelism(data_parallel_shard_degree=1, tensor_parallel_degree=2),
        roles=table,
        batch=BATCHES["llama, documents"],
        steps=1,
        num_microbatches=1,
        activation_checkpoint=FullActivationCheckpoint.Config(),
    )
    report.raise_for_failure()


def test_documents_from_local_positions_are_detected(monkeypatch):
    """transformers itself would derive documents from the positions of one rank's tokens."""
    monkeypatch.setattr(hugging_face_attention, "_documents", lambda positions: torch.zeros_like(positions))
    report = check_parallel(
        build("llama"),
        parallelism(data_parallel_shard_degree=1),
        roles=roles("llama"),
        batch=BATCHES["llama, documents"],
        steps=1,
    )
    assert not any(mesh.ok for mesh in report.meshes.values())


def refusal(make, method: str = "gather") -> str:
    dims = parallelism()[method].build(world_size=2, device_type="cpu")
    try:
        parallel = parallelize(make(), {}, dims, output=lambda output: output.logits)
        parallel.forward_backward([make_batch()], per_token(lambda head, hidden, _: (hidden.sum(), hidden.sum())), 1)
    except (ConfigError, ValueError) as error:
        return str(error)
    return ""


def test_unsupported_attention_raises_with_the_reason(run_ranks):
    def bloom():
        return transformers.BloomForCausalLM(
            transformers.BloomConfig(hidden_size=32, n_head=4, n_layer=1, vocab_size=64)
        )

    def drops():
        config = transformers.LlamaConfig(**{**SMALL, "attention_dropout": 0.1})
        return transformers.LlamaForCausalLM(config).train()

    for of_bloom, of_dropout in run_ranks(2, lambda: [refusal(bloom), refusal(drops, "ring")]):
        assert "does not use the attention interface of transformers, got BloomForCausalLM" in of_bloom
        assert "dropout must be 0 with context_parallel_method ring, got 0.1" in of_dropout


def test_the_attention_implementation_is_restored_after_a_step(run_ranks):
    def on_rank():
        model = build("llama")()
        ids = make_batch().inputs["input_ids"]
        expected = model(ids).logits
        parallel = parallelize(model, {}, parallelism()["ring"].build(world_size=2, device_type="cpu"))
        parallel.evaluate([make_batch()], per_token(lambda head, output, _: (output.logits.sum(), output.logits.sum())))
        torch.testing.assert_close(model(ids).logits, expected)
        assert model.config._attn_implementation == "sdpa"

    run_ranks(2, on_rank)
