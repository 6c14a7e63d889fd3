"""Roles for FSDP of any model, and errors for models without a table of roles."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import ParallelDims, check_parallel, fsdp_roles, parallelize
from titan_parallel.check import meshes
from titan_parallel.hugging_face import roles_of
from torch import nn

transformers = pytest.importorskip("transformers", reason="builds models of transformers")
diffusers = pytest.importorskip("diffusers", reason="builds models of diffusers")

TEXT = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 0, "use_cache": False}
BOTH = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))}
WIDE = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16}
IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
SEQ_TO_SEQ = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
PIXELS = {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
LATENTS = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
DIFFUSION = {
    "sample": LATENTS,
    "timestep": torch.arange(4),
    "encoder_hidden_states": torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1)),
}


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**TEXT, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**TEXT, **BOTH, **WIDE, max_position_embeddings=64)
    )


def mamba2():
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1,
            chunk_size=8, use_cache=False,
        )
    )  # fmt: skip


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, patch_size=4, num_labels=10))


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


class SharedLayers(nn.Module):
    """A module that two of the layers share."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(8, 8)
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), part) for part in (shared, shared))

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


MODELS = {
    "shared": (SharedLayers, {"ids": IDS % 20}, {"layers.*": "block"}),
    "t5": (t5, SEQ_TO_SEQ, {"encoder.block.*": "block", "decoder.block.*": "block"}),
    "bart": (bart, SEQ_TO_SEQ, {"model.encoder.layers.*": "block", "model.decoder.layers.*": "block"}),
    "mamba2": (mamba2, {"input_ids": IDS}, {"backbone.layers.*": "block"}),
    "vit": (vit, PIXELS, {"vit.layers.*": "block"}),
    "unet": (unet, DIFFUSION, {"down_blocks.*": "block", "up_blocks.*": "block", "mid_block.resnets.*": "block"}),
}


def squares(head, output, targets):
    values = head(output).flatten(1)
    return (values - targets["wanted"][:, : values.size(1)]).square().sum(), torch.tensor(values.numel())


def first_output(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize(
    "name", [name if name in ("shared", "t5") else pytest.param(name, marks=pytest.mark.full) for name in MODELS]
)
def test_fsdp_roles_shard_any_model(name):
    build, inputs, table = MODELS[name]
    assert fsdp_roles(build()) == table
    wanted = torch.randn(4, 2048, generator=torch.Generator().manual_seed(2))
    batch = SimpleNamespace(inputs=inputs, targets={"wanted": wanted}, sequence_dims={})
    report = check_parallel(
        build,
        meshes("fsdp2"),
        roles=table,
        batch=batch,
        loss=squares,
        output=first_output,
        steps=1,
    )
    assert report.ok, report


def test_a_model_without_lists_of_layers_is_one_unit():
    assert fsdp_roles(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == {}


def test_roles_of_a_model_of_another_library_names_fsdp_roles():
    flux = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=[2, 2, 4],
    )
    with pytest.raises(ConfigError, match=r"must be given a model of transformers, got a FluxTransformer2DModel\. Use"):
        roles_of(flux)


def hybrid(name, **changes):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **heads, **changes})
    return lambda: transformers.AutoModelForCausalLM.from_config(config)


KINDS = ["linear_attention", "full_attention"]
DECLARED = {
    "minimax": hybrid("MiniMax", num_local_experts=2, num_experts_per_tok=1, layer_types=KINDS, block_size=4),
    "qwen3_next": hybrid(
        "Qwen3Next",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=KINDS,
    ),
}


@pytest.mark.parametrize("name", ["minimax", pytest.param("qwen3_next", marks=pytest.mark.full)])
def test_hybrid_layers_are_split_where_possible(name):
    """Fused experts are included; they are computed one by one in fp64."""
    named = {"by default": ParallelDims.Config(tensor_parallel_degree=2), **meshes("fsdp2")}
    report = check_parallel(DECLARED[name], named, steps=1)
    assert report.ok, report


def test_encoder_decoder_models_raise_under_context_and_pipeline_parallel(run_ranks):
    def said():
        messages = []
        for degree in ("context", "pipeline"):
            dims = ParallelDims.Config(**{f"{degree}_parallel_degree": 2}).build(world_size=2, device_type="cpu")
            torch.manual_seed(0)
            model = bart()
            with pytest.raises(ConfigError) as caught:
                parallelize(model, fsdp_roles(model), dims)
            messages.append(str(caught.value))
        return messages

    for context, pipeline in run_ranks(2, said):
        assert "context_parallel_degree must be 1 for a model of transformers with an encoder and a decoder" in context
        assert "pipeline_parallel_degree must be 1 for several stacks of blocks" in pipeline


class CallsIntoABlock(nn.Module):
    """Like DiT: after the blocks it calls a layer inside the first of them."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.layers[0][0](x))


def test_a_weight_read_outside_its_module_raises():
    report = check_parallel(CallsIntoABlock, meshes("fsdp2"), roles={"layers.*": "block"}, steps=1)
    assert "must be read within the forward of that module" in str(report), report
    report = check_parallel(CallsIntoABlock, meshes("fsdp2"), roles={"layers.1": "block"}, steps=1)
    assert report.ok, report
