"""Hugging Face models with the roles that they declare: the loss and every gradient equal those of the plain model."""

from __future__ import annotations

import logging
import os
from collections import Counter
from contextlib import nullcontext
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import Compile, FullActivationCheckpoint, ParallelDims, parallelize
from titan_parallel.check.tolerances import MULTIPLE
from titan_parallel.mesh import collectives
from titan_parallel.probe.float64 import computing_in
from titan_parallel.sharding_plan.features import parts
from titan_parallel.tensor_parallel import apply as tensor_parallel
from titan_parallel.testing import check_same_gradients, full_gradients
from torch import nn

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
        {
            "attention_types": [[["global", "local"], 1]],
            "window_size": 3,
            **dict.fromkeys(("embed_dropout", "resid_dropout", "attention_dropout"), 0.0),
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
}
MODELS_OF_MORE_LAYERS = {
    "llama of three layers": ("Llama", {"num_hidden_layers": 3}),
    "llama of ten layers": ("Llama", {"num_hidden_layers": 10}),
    "gpt2 of ten layers": ("GPT2", {**WITHOUT_DROPOUT, "num_hidden_layers": 10}),
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


MODEL_CLASS = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING


def make(case: str, attention: str = "sdpa", **sizes) -> nn.Module:
    """Return a model with the same random weights on every call, different from its initialization."""
    name, changes = {**MODELS, **MODELS_OF_MORE_LAYERS}[case]
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


def plain_step(model: nn.Module, batch: SimpleNamespace, context) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss sum, and the gradients of the mean loss."""
    labels = batch.targets["labels"]
    with context:
        logits = model(**batch.inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss / int((labels != -100).sum())).backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def turned(batch: SimpleNamespace, count: int) -> SimpleNamespace:
    """Return the batch rotated by `count` samples."""
    inputs, targets = ({n: t.roll(-count, 0) for n, t in part.items()} for part in (batch.inputs, batch.targets))
    return SimpleNamespace(inputs=inputs, targets=targets)


def judge(small, case: str, degrees: dict, attention="sdpa", lifted=True, **options) -> None:
    """Raise AssertionError if the loss or a gradient differs from the plain model's, in fp64.

    Without `lifted` (compiled blocks), fp32 computations of the model stay in fp32: the tolerance is their rounding in
    the plain model.
    """
    batch = make_batch()
    expected_loss, expected = plain_step(make(case, attention), batch, small.in_fp64())
    rounded = [
        plain_step(make(case, attention), turned(batch, count), nullcontext()) for count in ((0, 1, 2) * (not lifted))
    ]
    dims = ParallelDims.Config(**degrees).build(world_size=torch.distributed.get_world_size(), device_type="cpu")
    model = make(case, attention)
    parallel = parallelize(model, roles_of(model), dims, output=attrgetter("logits"), **options)
    rows = len(batch.targets["labels"]) // dims.dp_size
    part = slice(dims.dp_rank * rows, (dims.dp_rank + 1) * rows)
    mine = SimpleNamespace(
        inputs={name: tensor[part] for name, tensor in batch.inputs.items()},
        targets={name: tensor[part] for name, tensor in batch.targets.items()},
        sequence_dims=batch.sequence_dims,
    )
    with computing_in(torch.float64) if lifted else nullcontext():  # also for recomputed forwards
        loss = parallel.forward_backward([mine], small.chunked_loss, int((batch.targets["labels"] != -100).sum()))
    allowed = max([1e-12 * expected_loss, *(MULTIPLE * abs(each - expected_loss) for each, _ in rounded)])
    assert float(loss) == pytest.approx(expected_loss, abs=allowed, rel=0)
    check_same_gradients(full_gradients(model), expected, [gradients for _, gradients in rounded])


FOUR = ("llama", "llama of one key-value head", "qwen3", "olmo2", "phi3", "gpt2")
"""Models with fewer key-value heads than 4 ranks."""
TWO_BY_DEFAULT, FOUR_BY_DEFAULT = ("tp2", "tp2_sequence"), ("tp4_sequence", "fsdp2_tp2_sequence")
REST = [
    (2, list(MODELS), [mesh for mesh in MESHES[2] if mesh not in TWO_BY_DEFAULT]),
    (4, FOUR, [mesh for mesh in MESHES[4] if mesh not in FOUR_BY_DEFAULT]),
    (4, [case for case in MODELS if case not in FOUR], list(MESHES[4])),
]


def complaints(small, cases, meshes, **options) -> list[str]:
    """Return the errors of the cases on each mesh; an error on one rank only ends the test."""
    wrong = []
    for case in cases:
        for mesh in meshes:
            try:
                judge(small, case, MESHES[torch.distributed.get_world_size()][mesh], **options)
            except AssertionError as error:
                wrong.append(f"{case} on {mesh}: {error}")
    return wrong


@pytest.mark.parametrize(
    ("world_size", "cases", "meshes"),
    [
        (2, list(MODELS), TWO_BY_DEFAULT),
        (2, ("llama", "granite", "gpt2"), ("fsdp2",)),
        (4, FOUR, FOUR_BY_DEFAULT),
        *(pytest.param(*rest, marks=pytest.mark.full) for rest in REST),
    ],
)
def test_gradients_equal_the_plain_model(run_ranks, small, world_size, cases, meshes):
    for wrong in run_ranks(world_size, complaints, small, cases, meshes):
        assert wrong == []


def test_eager_attention_and_activation_checkpointing_equal_the_plain_model(run_ranks, small):
    def wrong():
        cases = ("llama", "gemma3", "phi3 of one key-value head", "gpt2")
        eager = complaints(small, cases, ("tp2_sequence",), attention="eager")
        options = {"activation_checkpoint": FullActivationCheckpoint.Config()}
        return eager + complaints(small, ("llama", "opt"), TWO_BY_DEFAULT, **options)

    for said in run_ranks(2, wrong):
        assert said == []


def test_blocks_are_compiled_once(run_ranks, small):
    """Also with more blocks than dynamo's recompile limit of one function (8)."""

    def compiled():
        from torch._dynamo.utils import counters

        said = []
        for case in ("llama of ten layers", "gpt2 of ten layers"):
            torch._dynamo.reset()
            counters.clear()
            judge(small, case, TENSOR_2, lifted=False, compile=Compile.Config(backend="aot_eager"))
            said.append((counters["stats"]["unique_graphs"], dict(counters["graph_break"])))
        return said

    for said in run_ranks(2, compiled):
        assert said == [(1, {}), (1, {})]


def forget_to_sum(name):
    """Leave one kind of parameter out of the sum over tensor-parallel ranks."""
    right = tensor_parallel.TensorParallel._find_partial

    def without(self, split):
        return [parameter for parameter in right(self, split) if name not in parameter]

    tensor_parallel.TensorParallel._find_partial = without


def norm_own_heads_alone():
    def own(forward, axis, copies):
        def norm(x):
            whole = x.repeat_interleave(axis.size // copies, -1)[..., : x.size(-1) * (axis.size // copies)]
            return forward(whole)[..., : x.size(-1)]

        return norm

    tensor_parallel.wrap_norm_over_heads = own


def keep_gradients_of_normed_features():
    def own_part(ctx, grad):
        return grad.chunk(ctx.size, -1)[torch.distributed.get_rank()].contiguous(), None, None

    collectives._GatherFeatures.backward = staticmethod(own_part)


def take_the_first_heads_everywhere():
    tensor_parallel.parts = lambda projections, rank, size: parts(projections, 0, size)


def take_the_first_tokens_everywhere():
    collectives.Axis.own_tokens = lambda self, x: x.unflatten(-2, (self.size, -1)).select(-3, 0).contiguous()


def keep_gradients_before_the_blocks():
    right = collectives.Axis.sum
    collectives.Axis.sum = lambda self, x, of_gradients=False: right(self, x)


@pytest.mark.parametrize(
    ("case", "mesh", "sabotage", "says"),
    [
        ("llama of one key-value head", "tp2", lambda: forget_to_sum("k_proj"), "self_attn.k_proj.weight"),
        ("phi3", "tp2", lambda: forget_to_sum("qkv_proj"), "self_attn.qkv_proj.weight"),
        ("qwen3", "tp2", lambda: forget_to_sum("q_norm"), "self_attn.q_norm.weight"),
        ("olmo2", "tp2", lambda: forget_to_sum("k_norm"), "self_attn.k_norm.weight"),
        ("olmo2", "tp2", norm_own_heads_alone, ""),
        ("olmo2", "tp2", keep_gradients_of_normed_features, "gradient of"),
        ("gpt2", "tp2", take_the_first_heads_everywhere, ""),
        ("gpt2", "tp2_sequence", lambda: forget_to_sum("wpe"), "transformer.wpe.weight"),
        ("llama", "tp2_sequence", lambda: forget_to_sum("model.norm"), "model.norm.weight"),
        ("llama", "tp2_sequence", take_the_first_tokens_everywhere, ""),
        ("llama", "tp2_sequence", keep_gradients_before_the_blocks, "model.embed_tokens.weight"),
    ],
)
def test_broken_tensor_parallelism_is_detected(run_ranks, small, case, mesh, sabotage, says):
    def wrong():
        sabotage()
        return complaints(small, [case], [mesh])

    assert any(says in complaint for said in run_ranks(2, wrong) for complaint in said)


def collectives_of(run) -> Counter[str]:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as counter:
        run()
    return Counter({str(operator).rpartition(".")[2]: count for operator, count in counter.get_comm_counts().items()})


def collectives_of_a_block(block, length) -> Counter[str]:
    x = torch.randn(2, length, 32, dtype=torch.float64, requires_grad=True)
    rotation = tuple(torch.rand(1, 8, 8, dtype=torch.float64) for _ in range(2))
    return collectives_of(lambda: block(x, position_embeddings=rotation).sum().backward())


def test_a_block_gathers_once_and_reduces_once_per_region_and_direction(run_ranks, small):
    """A block has two regions. torch's parallel styles, one per projection, all-reduce the gradient of each input.

    With sequence parallelism the gradients of norms are partial: a step sums those of all blocks at once, but a direct
    backward those of each block.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    colwise = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rowwise = ("self_attn.o_proj", "mlp.down_proj")

    def on_mesh(case, sequence_parallel):
        dims = ParallelDims.Config(tensor_parallel_degree=2, sequence_parallel=sequence_parallel)
        model = make(case)
        dims = dims.build(world_size=2, device_type="cpu")
        return parallelize(model, roles_of(model), dims, output=attrgetter("logits"))

    def in_a_step(sequence_parallel):
        def step(case):
            parallel = on_mesh(case, sequence_parallel)
            return collectives_of(lambda: parallel.forward_backward([make_batch()], small.chunked_loss, 1))

        return step("llama of three layers") - step("llama")

    def alone(sequence_parallel):
        model = on_mesh("llama of three layers", sequence_parallel).model
        return collectives_of_a_block(model.model.layers[1], 4 if sequence_parallel else 8)

    def by_projections():
        dims = ParallelDims.Config(**TENSOR_2).build(world_size=2, device_type="cpu")
        plan = {name: ColwiseParallel() for name in colwise} | {name: RowwiseParallel() for name in rowwise}
        return collectives_of_a_block(
            parallelize_module(make("llama of three layers").model.layers[1], dims.tp_mesh, plan), 8
        )

    def count():
        return [*map(in_a_step, (False, True)), *map(alone, (False, True)), by_projections()]

    gathers_and_scatters = {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 4}
    for whole, split, whole_alone, split_alone, projections in run_ranks(2, count):
        assert whole == whole_alone == {"all_reduce": 4}
        assert split == gathers_and_scatters
        assert split_alone == {**gathers_and_scatters, "all_reduce": 1}
        assert projections == {"all_reduce": 7}


def test_an_output_with_more_than_logits_asks_for_a_function(run_ranks, small):
    def said():
        model = make("llama")
        parallel = parallelize(model, roles_of(model), ParallelDims.Config().build(world_size=1, device_type="cpu"))
        with pytest.raises(TypeError) as caught:
            parallel.forward_backward([make_batch()], small.chunked_loss, 1)
        return str(caught.value)

    assert "attrgetter('logits')" in run_ranks(1, said)[0]


def test_a_model_that_cannot_be_split_raises_with_the_reason(run_ranks):
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ConfigError, match=r"BloomForCausalLM, which adds .*attention.*'transformer.h.\*': 'block'"):
        roles_of(bloom)
    by_hand = {
        "transformer.h.*": "block",
        "transformer.h.*.self_attention": "region",
        "transformer.h.*.self_attention.query_key_value": ("colwise", {"packed": 1, "num_heads": 4}),
        "transformer.h.*.self_attention.dense": "rowwise",
    }

    def said():
        dims = ParallelDims.Config(tensor_parallel_degree=2, sequence_parallel=False)
        with pytest.raises(ConfigError) as caught:
            parallelize(bloom, by_hand, dims.build(world_size=2, device_type="cpu"))
        return str(caught.value)

    assert "whose forward takes 'residual'" in run_ranks(2, said)[0]


def test_a_model_without_a_plan_raises_with_the_lines_to_write():
    sizes = {"vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48}
    with pytest.raises(ConfigError) as caught:
        roles_of(transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(**sizes)))
    assert "fsdp_roles(model): {'transformer.h.*': 'block'}" in str(caught.value)
    assert "transformer.h.*.attn.c_attn" in str(caught.value)


def test_operations_after_the_head_raise_with_the_option_to_set(run_ranks, small):
    def said():
        model = make("granite")
        roles = {**roles_of(model), "lm_head": "head"}
        dims = ParallelDims.Config(**TENSOR_2).build(world_size=2, device_type="cpu")
        parallel = parallelize(model, roles, dims, output=attrgetter("logits"))
        with pytest.raises(ValueError, match="output of the model must be what its head returned") as caught:
            parallel.forward_backward([make_batch()], small.chunked_loss, 1)
        return str(caught.value)

    assert '("head", {"takes_loss": False})' in run_ranks(2, said)[0]
