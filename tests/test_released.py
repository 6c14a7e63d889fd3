"""Weights as families are released, quantized and with parts besides, give the logits of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from titan_ckpt import CheckpointError, load_hf, save_hf
from titan_models import Decoder
from titan_models.deepseek import deepseek_v3_debug
from titan_models.gpt_oss import gpt_oss_debug
from titan_models.llama4 import llama4_debug
from titan_models.qwen3 import qwen3_moe_debug
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the judge of these tests")

BLOCK = 128


def small(config: Decoder.Config) -> Decoder.Config:
    config.vocab_size, config.dim, config.num_layers = 160, 192, 4
    return config


def small_gpt_oss() -> Decoder.Config:
    config = gpt_oss_debug()
    for block in (config.block, *config.layer_overrides.values()):
        block.feed_forward.experts.hidden_dim = 96
    return config


def released_by_deepseek(config: Any, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """FP8 blocks in every projection but the gates, the module that predicts one token more, biases in fp32."""
    released = {}
    for name, tensor in state.items():
        if tensor.dim() == 2 and not any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.")):
            released |= as_fp8(name, tensor)
        else:
            released[name] = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16()
    depth = config["num_hidden_layers"]
    released |= as_fp8(f"model.layers.{depth}.eh_proj.weight", torch.rand(192, 384))
    released[f"model.layers.{depth}.enorm.weight"] = torch.ones(192, dtype=torch.bfloat16)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    return config | {"num_nextn_predict_layers": 1, "quantization_config": quantization}, released


def as_fp8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    rows, columns = (math.ceil(size / BLOCK) for size in tensor.shape)
    factors = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) / 4000 + 1e-4
    whole = factors.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: tensor.shape[0], : tensor.shape[1]]
    return {name: (tensor.float() / whole).to(torch.float8_e4m3fn), f"{name}_scale_inv": factors}


def without_fp8(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """Number by number, each times the factor of its block."""
    plain = {}
    for name, tensor in released.items():
        if name.endswith("_scale_inv") or name.startswith("model.layers.4."):
            continue
        plain[name] = tensor.float()
        if f"{name}_scale_inv" in released:
            for row in range(tensor.shape[0]):
                factors = released[f"{name}_scale_inv"][row // BLOCK, torch.arange(tensor.shape[1]) // BLOCK]
                plain[name][row] *= factors
    return plain


def released_by_openai(config: Any, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """MXFP4 in the experts' projections, the rest in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    released = {}
    for name, tensor in state.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, columns, rows = tensor.shape
            shape = (num_experts, rows, columns // 32)
            released[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            released[f"{name}_scales"] = torch.randint(118, 123, shape, generator=generator, dtype=torch.uint8)
        else:
            released[name] = tensor.bfloat16()
    return config | {"quantization_config": {"quant_method": "mxfp4"}}, released


def without_mxfp4(released: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {name: tensor.float() for name, tensor in released.items() if not name.endswith(("_blocks", "_scales"))}
    for name in released:
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            convert = transformers.integrations.mxfp4.convert_moe_packed_tensors
            plain[stem] = convert(released[name], released[f"{stem}_scales"], dtype=torch.float32)
    return plain


def released_by_meta(config: Any, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inside a model of text and images."""
    released = {f"language_model.{name}": tensor.bfloat16() for name, tensor in state.items()}
    released["vision_model.patch_embedding.linear.weight"] = torch.rand(8, 3, dtype=torch.bfloat16)
    released["multi_modal_projector.linear_1.weight"] = torch.rand(4, 8, dtype=torch.bfloat16)
    return {"model_type": "llama4", "text_config": config, "vision_config": {}}, released


def without_images(released: dict[str, Tensor]) -> dict[str, Tensor]:
    begin = "language_model."
    return {name.removeprefix(begin): tensor.float() for name, tensor in released.items() if name.startswith(begin)}


def released_by_qwen(config: Any, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As it is."""
    return config, {name: tensor.bfloat16() for name, tensor in state.items()}


def in_fp32(released: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in released.items()}


def save_in_two(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """A folder of two shards and their index."""
    folder.mkdir()
    names = sorted(state)
    weight_map = {name: f"model-0000{1 + (place % 2)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: state[name].contiguous() for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def released(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Decoder.Config, Path, Path]:
    """A family's config, a folder as it is released, and one of the same numbers for transformers."""
    flavor, release, plainly = request.param
    config = small(flavor())
    model = config.build()
    model.init_weights(seed=0)
    save_hf(model.state_dict(), config.hf_adapter(), tmp_path / "own")
    state: dict[str, Tensor] = {}
    for path in (tmp_path / "own").glob("*.safetensors"):
        state |= load_file(path)
    hf_config, theirs = release(json.loads((tmp_path / "own" / "config.json").read_text()), state)
    save_in_two(tmp_path / "released", hf_config, theirs)
    save_in_two(tmp_path / "plain", config.hf_adapter().hf_config(), plainly(theirs))
    return config, tmp_path / "released", tmp_path / "plain"


RELEASES = [
    (deepseek_v3_debug, released_by_deepseek, without_fp8),
    (small_gpt_oss, released_by_openai, without_mxfp4),
    (llama4_debug, released_by_meta, without_images),
    (qwen3_moe_debug, released_by_qwen, in_fp32),
]
IDS = ["deepseek", "gpt_oss", "llama4", "qwen3"]
with_each = pytest.mark.parametrize("released", RELEASES, indirect=True, ids=IDS)
with_each_in_full = pytest.mark.parametrize(
    "released",
    [RELEASES[0], *(pytest.param(release, marks=pytest.mark.full) for release in RELEASES[1:])],
    indirect=True,
    ids=IDS,
)


@with_each
def test_released_weights_give_the_logits_of_transformers(released: Any, fp64_model: Any, in_fp64: Any) -> None:
    config, folder, plain = released
    model = config.build()
    load_hf(folder, model.state_dict(), config.hf_adapter())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    model, theirs = model.double(), fp64_model(theirs)
    tokens = torch.randint(160, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), in_fp64():
        found, expected = model(tokens, torch.arange(150).expand(2, 150)), theirs(tokens).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def in_bfloat16(config: Decoder.Config) -> Decoder:
    """But for its buffers."""
    model = config.build()
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16()
    return model


@with_each_in_full
def test_released_weights_come_in_as_bfloat16_too(released: Any) -> None:
    """And go out and in again, bit for bit."""
    config, folder, _ = released
    model = in_bfloat16(config)
    load_hf(folder, model.state_dict(), config.hf_adapter())
    save_hf(model.state_dict(), config.hf_adapter(), folder.parent / "again")
    again = in_bfloat16(config)
    load_hf(folder.parent / "again", again.state_dict(), config.hf_adapter())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


@with_each_in_full
def test_released_weights_are_refused_before_one_is_touched(released: Any) -> None:
    config, folder, _ = released
    path = folder / "model-00002-of-00002.safetensors"
    state = load_file(path)
    name = min(state)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    model = config.build()
    for broken in (
        {key: tensor for key, tensor in state.items() if key != name},
        state | {"lm_head.bias": torch.zeros(160, dtype=torch.bfloat16)},
        state | {name: torch.zeros(7, 7, dtype=state[name].dtype)},
    ):
        save_file(broken, path)
        weight_map = {key: file for key, file in index["weight_map"].items() if file != path.name}
        weight_map |= dict.fromkeys(broken, path.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError):
            load_hf(folder, model.state_dict(), config.hf_adapter())
        assert all(parameter.isnan().all() for parameter in model.parameters())
