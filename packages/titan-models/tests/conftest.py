"""Fixtures: small models with all features of the large ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from titan_models import Attention, Decoder, FeedForward, MultiHeadLatentAttention, Yarn
from titan_models.moe import ClampedGating, MoE


def _shrunk(flavor: Callable[[], Decoder.Config]) -> Decoder.Config:
    config = flavor()
    config.vocab_size, config.dim, config.num_layers = 97, 48, 5 if config.layer_overrides else 3
    for block in (config.block, *config.layer_overrides.values()):
        _shrink_attention(block.attention)
        _shrink_feed_forward(block.feed_forward)
    config.rope.dim = 8
    if config.rope.scaling is not None:
        config.rope.scaling.original_max_seq_len = 32
        if isinstance(config.rope.scaling, Yarn.Config):  # so that some of the few pairs lie between fast and slow
            config.rope.scaling.beta_fast, config.rope.scaling.beta_slow = 4.0, 0.01
    config.max_seq_len = 1024
    return config


def _shrink_attention(attention: Attention.Config) -> None:
    for modifier in attention.mask_modifiers:
        modifier.size = 16
    if isinstance(attention, MultiHeadLatentAttention.Config):
        attention.num_heads, attention.kv_rank, attention.q_rank = 4, 20, attention.q_rank and 28
        attention.head_dim, attention.rotated_head_dim, attention.value_head_dim = 10, 8, 12
        return
    groups = attention.num_heads // attention.num_kv_heads
    attention.num_kv_heads, attention.num_heads, attention.head_dim = 2, 2 * min(groups, 4), 8
    if attention.temperature is not None:
        attention.temperature.step = 16


def _shrink_feed_forward(feed_forward: FeedForward.Config) -> None:
    if not isinstance(feed_forward, MoE.Config):
        feed_forward.hidden_dim = 80
        return
    router, shared = feed_forward.router, feed_forward.shared
    router.num_experts, router.top_k = 8, min(router.top_k, 3)
    if router.groups is not None:
        router.groups.num_groups, router.groups.num_kept = 4, 2
    if shared is not None:
        shared.hidden_dim = 20 * shared.hidden_dim // feed_forward.experts.hidden_dim
    feed_forward.experts.hidden_dim = 20
    if isinstance(feed_forward.experts.gating, ClampedGating.Config):
        feed_forward.experts.gating.limit = 0.5  # reached with small weights


@pytest.fixture(scope="session")
def shrunk() -> Callable[[Callable[[], Decoder.Config]], Decoder.Config]:
    """`shrunk(llama3_8b)`: the flavor with 3 to 5 layers of width 48, and windows and chunks of 16."""
    return _shrunk


def _build_model(config: Decoder.Config, dtype: torch.dtype = torch.float32, seed: int = 1) -> Decoder:
    model = config.build()
    model.init_weights(seed=seed)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # weights of exactly 1 would hide errors
                parameter.uniform_(0.5, 1.5, generator=generator)
            if name.endswith(("bias", "sinks")):  # as would zeros
                parameter.normal_(std=0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("balancing.bias"):  # large enough to change the selection
                buffer.uniform_(-0.02, 0.02, generator=generator)
    return model.to(dtype)


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Decoder]:
    """`build_model(config, dtype, seed)`: an initialized model, with random norms, biases and sinks."""
    return _build_model


@pytest.fixture
def reference(tmp_path: Path, fp64_model: Any) -> Callable[..., Any]:
    """`reference(model, dtype)`: the model that transformers loads from an export; entirely fp64 with that dtype."""
    import transformers
    from safetensors.torch import save_file

    def load(model: Decoder, dtype: torch.dtype = torch.float32) -> Any:
        adapter = model.config.hf_adapter()
        state = {name: tensor.contiguous() for name, tensor in adapter.to_hf(model.state_dict()).items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(adapter.hf_config(dtype)))
        theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=dtype,
            output_loading_info=True,
        )
        assert not any(loading.values())
        assert [type(theirs).__name__] == theirs.config.architectures == adapter.hf_config()["architectures"]
        if dtype is torch.float64:
            theirs = fp64_model(theirs, state)
        return theirs.train()

    return load


def _within_rounding(got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    unit = torch.finfo(got.dtype).eps / 2
    got, plain, exact = got.detach().double(), plain.detach().double(), exact.detach()
    return bool((got - exact).norm() <= 10 * ((plain - exact).norm() + unit * exact.norm()))


@pytest.fixture(scope="session")
def within_rounding() -> Callable[..., bool]:
    """`within_rounding(got, plain, exact)`: the error of `got` is at most ten times that of `plain`.

    `exact` is the fp64 result, `plain` another computation in the dtype of `got`. Errors are 2-norms.
    """
    return _within_rounding


@pytest.fixture(scope="session")
def packed() -> dict[str, torch.Tensor]:
    """Two sequences of 40 tokens below 97, with documents of 11, 17, 12 and of 5, 35 tokens."""
    lengths = [[11, 17, 12], [5, 35]]
    generator = torch.Generator().manual_seed(3)
    return {
        "tokens": torch.randint(97, (2, 40), generator=generator),
        "positions": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]),
        "document_ids": torch.stack(
            [torch.cat([torch.full((n,), 10 * i + j) for j, n in enumerate(row)]) for i, row in enumerate(lengths)]
        ),
    }
