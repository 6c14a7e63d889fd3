"""Hugging Face models by the roles that they declare: loss and every gradient are those of the plain model."""

from __future__ import annotations

import logging
import os
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from titan_parallel import FullRecompute, ParallelDims, parallelize
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn
from torch.overrides import TorchFunctionMode

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
transformers = pytest.importorskip("transformers")
from titan_parallel.hugging_face import roles_of  # noqa: E402

logging.getLogger("transformers").setLevel(logging.ERROR)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
WITHOUT_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "n_inner": 48}
WINDOWS = {"head_dim": 8, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama of one key-value head": ("Llama", {"num_key_value_heads": 1}),
    "llama of an odd vocabulary": ("Llama", {"vocab_size": 51, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 3}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 of one key-value head": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", WINDOWS),
    "gemma3": ("Gemma3Text", WINDOWS),
    "olmo2": ("Olmo2", {}),
    "olmo2 of one key-value head": ("Olmo2", {"num_key_value_heads": 1}),
    "phi": ("Phi", {"resid_pdrop": 0.0}),
    "phi3": ("Phi3", {}),
    "phi3 of one key-value head": ("Phi3", {"num_key_value_heads": 1}),
    "granite": (
        "Granite",
        {"logits_scaling": 3.0, "embedding_multiplier": 5.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
    ),
    "gpt2": ("GPT2", WITHOUT_DROPOUT),
    "gpt_neox": ("GPTNeoX", {}),
    "starcoder2": ("Starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}),
    "cohere2": ("Cohere2", {**WINDOWS, "logit_scale": 0.5}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "gptj": ("GPTJ", {**WITHOUT_DROPOUT, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeo",
        {"attention_types": [[["global", "local"], 1]], "window_size": 3, "embed_dropout": 0.0, "resid_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}),
}
TENSOR_2 = {"tensor_parallel_degree": 2}
MESHES = {
    2: {"fsdp2": {}, "tp2": {**TENSOR_2, "sequence_parallel": False}, "tp2_sequence": TENSOR_2},
    4: {
        "tp4": {"tensor_parallel_degree": 4, "sequence_parallel": False, "loss_parallel": False},
        "tp4_sequence": {"tensor_parallel_degree": 4},
        "fsdp2_tp2": {**TENSOR_2, "sequence_parallel": False},
        "fsdp2_tp2_sequence": TENSOR_2,
    },
}
"""ranks -> name -> degrees"""


class Float32IsFloat64(TorchFunctionMode):
    """Foreign code computes norms, rotations and softmax in fp32 whatever its weights are; here in fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {n: torch.float64 if v is torch.float32 else v for n, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


MODEL_CLASS = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING


def make(case: str, attention: str = "sdpa", **sizes) -> nn.Module:
    """The same weights on every call, away from what they are initialised to."""
    name, changes = MODELS[case]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes, **sizes})
    attention = attention if MODEL_CLASS[type(config)]._supports_sdpa else "eager"
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    ).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else 0.5 + noise * 0.2)
    return model


def make_batch() -> SimpleNamespace:
    ids = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[0, 5:] = -100
    return SimpleNamespace(inputs={"input_ids": ids}, targets={"labels": labels}, sequence_dims={"input_ids": 1})


def plain_step(model: nn.Module, batch: SimpleNamespace) -> tuple[float, dict[str, torch.Tensor], int]:
    labels = batch.targets["labels"]
    count = int((labels != -100).sum())
    with Float32IsFloat64():
        logits = model(**batch.inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss / count).backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, count


def judge(small, case: str, degrees: dict, roles=roles_of, attention="sdpa", **options) -> None:
    """Raise AssertionError where the loss or a gradient differs from the plain model's."""
    batch = make_batch()
    expected_loss, expected, count = plain_step(make(case, attention), batch)
    dims = ParallelDims.Config(**degrees).build(world_size=torch.distributed.get_world_size(), device_type="cpu")
    model = make(case, attention)
    parallel = parallelize(model, roles(model), dims, output=attrgetter("logits"), **options)
    rows = len(batch.targets["labels"]) // dims.num_data_ranks
    part = slice(dims.data_rank * rows, (dims.data_rank + 1) * rows)
    mine = SimpleNamespace(
        inputs={name: tensor[part] for name, tensor in batch.inputs.items()},
        targets={name: tensor[part] for name, tensor in batch.targets.items()},
        sequence_dims=batch.sequence_dims,
    )
    with Float32IsFloat64():
        loss = parallel.forward_backward([mine], small.chunked_loss, count)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-12)
    check_same_gradients(full_gradients(model), expected)


def complaints(small, cases, world_size) -> dict[str, str]:
    """What is wrong, of each of the cases on each mesh."""
    import traceback
    wrong = {}
    for case in cases:
        for mesh, degrees in MESHES[world_size].items():
            try:
                judge(small, case, degrees)
            except Exception as error:
                wrong[f"{case} on {mesh}"] = f"{type(error).__name__}: {error}"[:300] + "\n".join(traceback.format_exc().splitlines()[-8:])
    return wrong


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("world_size", MESHES)
def test_a_model_is_trained_as_it_is(run_ranks, small, case, world_size):
    for wrong in run_ranks(world_size, complaints, small, [case], world_size):
        assert not wrong, "\n".join(map("\n".join, wrong.items()))
