"""Released checkpoints: several dtypes, buffers of rotary embeddings, models under another name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from titan_models.deepseek import deepseek_v3_debug
from titan_models.gpt_oss import gpt_oss_20b
from titan_models.layers.yarn import Yarn
from titan_models.llama3 import llama3_1b, llama3_8b
from titan_models.qwen3 import qwen3_8b, qwen3_30b_a3b
from torch import Tensor

FP32 = ("norm.weight", "lm_head.weight", "mlp.gate.weight", "mlp.router.weight", "sinks", "layernorm.weight")
"""Suffixes of fp32 weights among bf16 ones in DeepSeek-V3.1-Terminus and others."""


def mixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.contiguous() if name.endswith(FP32) else tensor.bfloat16().contiguous()
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("flavor", [llama3_8b, qwen3_8b, qwen3_30b_a3b, gpt_oss_20b, deepseek_v3_debug])
def test_weights_of_mixed_dtypes_load_without_rounding(
    flavor: Any, shrunk: Any, build_model: Any, tmp_path: Path
) -> None:
    """Compared with transformers in fp32."""
    transformers = pytest.importorskip("transformers", reason="the judge of this test")
    config = flavor() if flavor is deepseek_v3_debug else shrunk(flavor)
    adapter = config.hf_adapter()
    stored = mixed(adapter.to_hf(build_model(config).state_dict()))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.bfloat16}
    model = config.build()
    model.load_state_dict(adapter.from_hf(stored))
    found = adapter.to_hf(model.state_dict())
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in stored.items())

    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(adapter.hf_config()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = model(tokens, torch.arange(20).expand(2, 20))
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=2e-5)


def test_a_tied_head_may_have_another_dtype(shrunk: Any, build_model: Any) -> None:
    adapter = shrunk(llama3_1b).hf_adapter()
    stored = mixed(adapter.to_hf(build_model(shrunk(llama3_1b)).state_dict()))
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].float()
    assert adapter.from_hf(stored)["embedding.weight"].dtype == torch.bfloat16
    stored["lm_head.weight"] = stored["lm_head.weight"] * (1 + 2**-20)
    with pytest.raises(ValueError, match="must have the same values"):
        adapter.from_hf(stored)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_dtypes_that_need_scales_are_rejected_by_name(dtype: torch.dtype, shrunk: Any, build_model: Any) -> None:
    adapter = shrunk(llama3_8b).hf_adapter()
    stored = adapter.to_hf(build_model(shrunk(llama3_8b)).state_dict())
    stored["model.norm.weight"] = stored["model.norm.weight"].to(dtype)
    with pytest.raises(ValueError, match=rf"stored with their scales, got model\.norm\.weight \({dtype}\)"):
        adapter.from_hf(stored)


@pytest.mark.parametrize("buffer", ["inv_freq", "original_inv_freq", "cos_cached", "sin_cached"])
def test_buffers_of_rotary_embeddings_are_ignored(buffer: str, shrunk: Any, build_model: Any) -> None:
    adapter: Any = shrunk(llama3_8b).hf_adapter()
    stored = adapter.to_hf(build_model(shrunk(llama3_8b)).state_dict())
    expected = adapter.from_hf(stored)
    stored[f"model.layers.1.self_attn.rotary_emb.{buffer}"] = torch.full((4,), torch.nan)
    stored[f"model.rotary_emb.{buffer}"] = torch.arange(4)
    found = adapter.from_hf(stored)
    assert all(found[name] is expected[name] for name in expected)
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.1\.self_attn\.rotary_emb\.weight"):
        adapter.from_hf(stored | {"model.layers.1.self_attn.rotary_emb.weight": torch.zeros(4)})


def test_kimi_k2_is_accepted_as_deepseek_v3(build_model: Callable[..., Any]) -> None:
    config = deepseek_v3_debug()
    yarn = {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    config.rope.scaling = Yarn.Config(original_max_seq_len=4096, **yarn)
    adapter = config.hf_adapter()
    released = {key: value for key, value in adapter.hf_config().items() if key != "rope_parameters"}
    released |= {"model_type": "kimi_k2", "rope_theta": config.rope.theta}
    released["rope_scaling"] = {**yarn, "type": "yarn", "original_max_position_embeddings": 4096}
    weights = adapter.to_hf(config.on_meta().state_dict())
    assert adapter.find(weights, released)
    released["rope_scaling"]["beta_fast"] = 32.0
    with pytest.raises(ValueError, match=r"beta_fast 32\.0 instead of 1\.0"):
        adapter.find(weights, released)
