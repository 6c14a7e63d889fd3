"""The mapping of names is bijective; errors name missing, unexpected and mismatched weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from titan_models import HfAdapter, RMSNorm, SwiGLU
from titan_models.llama3 import llama3_1b, llama3_8b
from titan_models.moe import LoadBalancingLoss, ZLoss
from titan_models.qwen3 import qwen3_0_6b, qwen3_8b, qwen3_30b_a3b
from torch import Tensor, nn


@pytest.fixture
def state(shrunk: Any, build_model: Any) -> dict[str, Tensor]:
    return build_model(shrunk(llama3_8b)).state_dict()


@pytest.fixture
def adapter(shrunk: Any) -> HfAdapter:
    return shrunk(llama3_8b).hf_adapter()


@pytest.mark.parametrize("flavor", [llama3_1b, llama3_8b, qwen3_0_6b, qwen3_8b])
def test_a_round_trip_returns_the_same_tensor_objects(flavor: Any, shrunk: Any, build_model: Any) -> None:
    state = build_model(shrunk(flavor)).state_dict()
    adapter = shrunk(flavor).hf_adapter()
    back = adapter.from_hf(adapter.to_hf(state))
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)


def test_experts_are_split_and_stacked(shrunk: Any, build_model: Any) -> None:
    state = build_model(shrunk(qwen3_30b_a3b)).state_dict()
    adapter = shrunk(qwen3_30b_a3b).hf_adapter()
    theirs = adapter.to_hf(state)
    matrix = theirs["model.layers.2.mlp.experts.7.down_proj.weight"]
    assert torch.equal(matrix, state["layers.2.feed_forward.experts.down_proj.weight"][7])
    back = adapter.from_hf(theirs)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert back["layers.0.feed_forward.router.weight"] is state["layers.0.feed_forward.router.weight"]
    del theirs["model.layers.2.mlp.experts.7.down_proj.weight"]
    theirs["model.layers.2.mlp.experts.8.down_proj.weight"] = matrix
    with pytest.raises(
        ValueError, match=r"missing: model\.layers\.2\.mlp\.experts\.7\.down_proj\.weight; unexpected: .*\.8\."
    ):
        adapter.from_hf(theirs)


def test_the_state_of_router_losses_is_not_exported_and_is_initialized_on_import(shrunk: Any, build_model: Any) -> None:
    config = shrunk(qwen3_30b_a3b)
    without = set(config.hf_adapter().to_hf(build_model(config).state_dict()))
    config.block.feed_forward.router.auxiliary_losses = [
        ZLoss.Config(weight=1e-3),
        LoadBalancingLoss.Config(weight=1e-3),
    ]
    state, adapter = build_model(config).state_dict(), config.hf_adapter()
    name = "layers.1.feed_forward.router.auxiliary_losses.1.shares"
    state[name].mul_(7)
    theirs = adapter.to_hf(state)
    assert set(theirs) == without
    back = adapter.from_hf(theirs)
    assert list(back) == list(state)
    assert torch.equal(back[name], torch.full_like(back[name], 1 / len(back[name])))
    assert {name for name in state if not torch.equal(back[name], state[name])} == {name}


def test_dense_blocks_among_moe_blocks_are_exported(shrunk: Any, build_model: Any) -> None:
    config = shrunk(qwen3_30b_a3b)
    config.layer_overrides = {"1": copy.deepcopy(config.block)}
    config.layer_overrides["1"].feed_forward = SwiGLU.Config(hidden_dim=44)
    adapter = config.hf_adapter()
    assert (adapter.hf_config()["mlp_only_layers"], adapter.hf_config()["intermediate_size"]) == ([1], 44)
    assert "model.layers.1.mlp.up_proj.weight" in adapter.to_hf(build_model(config).state_dict())


def test_moe_configs_that_qwen3_does_not_support_are_rejected(shrunk: Any) -> None:
    for name, value in [("score", "sigmoid"), ("scale", 2.0)]:
        config = shrunk(qwen3_30b_a3b)
        setattr(config.block.feed_forward.router, name, value)
        with pytest.raises(ValueError, match="MoE layer of Qwen3MoeForCausalLM must have SwiGLUExperts"):
            config.hf_adapter()
    config = shrunk(llama3_8b)
    config.block.feed_forward = shrunk(qwen3_30b_a3b).block.feed_forward
    with pytest.raises(ValueError, match=r"must be a SwiGLU, got MoE\.Config"):
        config.hf_adapter()


def test_a_tied_checkpoint_has_no_head_or_an_equal_one(shrunk: Any, build_model: Any) -> None:
    adapter = shrunk(llama3_1b).hf_adapter()
    state = adapter.to_hf(build_model(shrunk(llama3_1b)).state_dict())
    assert "lm_head.weight" not in state
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    assert "embedding.weight" in adapter.from_hf(state)
    assert (
        adapter.from_hf({name: tensor.to("meta") for name, tensor in state.items()}).keys()
        == adapter.from_hf(state).keys()
    )
    state["lm_head.weight"][3, 3] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        adapter.from_hf(state)


def test_a_missing_weight_is_named(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    theirs = adapter.to_hf(state)
    del theirs["model.layers.1.mlp.up_proj.weight"], state["norm.weight"]
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        adapter.from_hf(theirs)
    with pytest.raises(ValueError, match=r"missing: norm\.weight"):
        adapter.to_hf(state)


def test_an_unexpected_weight_is_named(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    theirs = adapter.to_hf(state)
    theirs["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.bias"):
        adapter.from_hf(theirs)
    state["layers.3.attention_norm.weight"] = torch.zeros(48)
    with pytest.raises(ValueError, match=r"layers\.3\.attention_norm\.weight"):
        adapter.to_hf(state)


def test_a_wrong_shape_is_named(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    theirs = adapter.to_hf(state)
    theirs["lm_head.weight"] = torch.zeros(96, 48)
    with pytest.raises(ValueError, match=r"lm_head\.weight \[96, 48\] instead of \[97, 48\]"):
        adapter.from_hf(theirs)


def test_a_wrong_dtype_is_named(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    state["norm.weight"] = state["norm.weight"].bfloat16()
    with pytest.raises(ValueError, match=r"norm\.weight \(torch\.bfloat16\) besides torch\.float32"):
        adapter.to_hf(state)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        adapter.to_hf({name: tensor.to(torch.int8) for name, tensor in state.items()})


def test_a_model_in_bf16_is_exported_in_bf16(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    half = adapter.to_hf({name: tensor.bfloat16() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert adapter.hf_config(torch.bfloat16)["dtype"] == "bfloat16"


def test_rules_must_be_bijective() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    for rules, message in [
        ({"0.weight": "a"}, "exactly one rule, got 0 for 1.weight"),
        ({"*.weight": "a"}, "must belong to one parameter, got several for a"),
        ({"*.weight": "a.*", "0.weight": "b"}, "exactly one rule, got 2 for 0.weight"),
        ({"*.weight": "a.*", "*.bias": "b.*"}, r"got no match for \*.bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            HfAdapter(model, rules=rules, repeats={}, config={})


def test_configs_that_llama_does_not_support_are_rejected(shrunk: Any) -> None:
    config = shrunk(llama3_8b)
    config.norm = RMSNorm.Config(eps=1e-6)
    with pytest.raises(ValueError, match="must have the same eps"):
        config.hf_adapter()


def test_configs_that_qwen3_does_not_support_are_rejected(shrunk: Any) -> None:
    config = shrunk(qwen3_8b)
    config.block.attention.qk_norm.eps = 1e-5
    with pytest.raises(ValueError, match="must have the same eps"):
        config.hf_adapter()
    config.block.attention.qk_norm = None
    with pytest.raises(ValueError, match=r"got no match for layers\.\*\.attention\.k_norm\.weight"):
        config.hf_adapter()


def test_sharded_tensors_are_renamed_without_copies(run_ranks: Callable[..., list[Any]], shrunk: Any) -> None:
    config = shrunk(llama3_1b)

    def there_and_back() -> bool:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = config.on_meta()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model.to_empty(device="cpu")
        model.init_weights(seed=0)
        state, adapter = model.state_dict(), config.hf_adapter()
        theirs = adapter.to_hf(state)
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].clone()
        back = adapter.from_hf(theirs)
        return list(back) == list(state) and all(back[name] is state[name] for name in state)

    assert run_ranks(2, there_and_back) == [True, True]
