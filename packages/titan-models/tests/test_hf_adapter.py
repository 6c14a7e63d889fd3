"""Names map one to one, and anything that does not fit is an error naming it."""

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
def state(shrunk: Any, made: Any) -> dict[str, Tensor]:
    return made(shrunk(llama3_8b)).state_dict()


@pytest.fixture
def adapter(shrunk: Any) -> HfAdapter:
    return shrunk(llama3_8b).hf_adapter()


@pytest.mark.parametrize("flavor", [llama3_1b, llama3_8b, qwen3_0_6b, qwen3_8b])
def test_there_and_back_is_the_same_tensors(flavor: Any, shrunk: Any, made: Any) -> None:
    state = made(shrunk(flavor)).state_dict()
    adapter = shrunk(flavor).hf_adapter()
    back = adapter.from_hf(adapter.to_hf(state))
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)


def test_experts_are_taken_apart_and_put_together(shrunk: Any, made: Any) -> None:
    state = made(shrunk(qwen3_30b_a3b)).state_dict()
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
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2\.mlp\.experts\.7\.down_proj\.weight and has .*\.8\."):
        adapter.from_hf(theirs)


def test_what_losses_of_routers_remember_stays_and_begins_anew(shrunk: Any, made: Any) -> None:
    config = shrunk(qwen3_30b_a3b)
    without = set(config.hf_adapter().to_hf(made(config).state_dict()))
    config.block.feed_forward.router.losses = [ZLoss.Config(weight=1e-3), LoadBalancingLoss.Config(weight=1e-3)]
    state, adapter = made(config).state_dict(), config.hf_adapter()
    name = "layers.1.feed_forward.router.losses.1.shares"
    state[name].mul_(7)
    theirs = adapter.to_hf(state)
    assert set(theirs) == without
    back = adapter.from_hf(theirs)
    assert list(back) == list(state)
    assert torch.equal(back[name], torch.full_like(back[name], 1 / len(back[name])))
    assert {name for name in state if not torch.equal(back[name], state[name])} == {name}


def test_dense_blocks_among_mixtures_of_experts(shrunk: Any, made: Any) -> None:
    config = shrunk(qwen3_30b_a3b)
    config.layer_overrides = {"1": copy.deepcopy(config.block)}
    config.layer_overrides["1"].feed_forward = SwiGLU.Config(hidden_dim=44)
    adapter = config.hf_adapter()
    assert (adapter.hf_config()["mlp_only_layers"], adapter.hf_config()["intermediate_size"]) == ([1], 44)
    assert "model.layers.1.mlp.up_proj.weight" in adapter.to_hf(made(config).state_dict())


def test_a_mixture_that_qwen3_cannot_have_is_refused(shrunk: Any) -> None:
    for name, value in [("score", "sigmoid"), ("scale", 2.0)]:
        config = shrunk(qwen3_30b_a3b)
        setattr(config.block.feed_forward.router, name, value)
        with pytest.raises(ValueError, match="Qwen3MoeForCausalLM has SwiGLUExperts"):
            config.hf_adapter()
    config = shrunk(llama3_8b)
    config.block.feed_forward = shrunk(qwen3_30b_a3b).block.feed_forward
    with pytest.raises(ValueError, match=r"Got a block with a MoE\.Config"):
        config.hf_adapter()


def test_a_tied_checkpoint_has_no_head_or_the_same_again(shrunk: Any, made: Any) -> None:
    adapter = shrunk(llama3_1b).hf_adapter()
    state = adapter.to_hf(made(shrunk(llama3_1b)).state_dict())
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
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        adapter.from_hf(theirs)
    with pytest.raises(ValueError, match=r"lacks norm\.weight"):
        adapter.to_hf(state)


def test_an_unexpected_weight_is_named(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    theirs = adapter.to_hf(state)
    theirs["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.bias"):
        adapter.from_hf(theirs)
    state["layers.3.attention_norm.weight"] = torch.zeros(48)
    with pytest.raises(ValueError, match=r"layers\.3\.attention_norm\.weight"):
        adapter.to_hf(state)


def test_another_shape_is_named(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    theirs = adapter.to_hf(state)
    theirs["lm_head.weight"] = torch.zeros(96, 48)
    with pytest.raises(ValueError, match=r"lm_head\.weight \[96, 48\] instead of \[97, 48\]"):
        adapter.from_hf(theirs)


def test_another_dtype_is_named(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    state["norm.weight"] = state["norm.weight"].bfloat16()
    with pytest.raises(ValueError, match=r"norm\.weight \(torch\.bfloat16\) among torch\.float32"):
        adapter.to_hf(state)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        adapter.to_hf({name: tensor.to(torch.int8) for name, tensor in state.items()})


def test_all_in_another_dtype_is_fine(adapter: HfAdapter, state: dict[str, Tensor]) -> None:
    half = adapter.to_hf({name: tensor.bfloat16() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert adapter.hf_config(torch.bfloat16)["dtype"] == "bfloat16"


def test_rules_that_are_no_bijection_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    for rules, message in [
        ({"0.weight": "a"}, "0 rules for the parameter 1.weight"),
        ({"*.weight": "a"}, "two parameters for a"),
        ({"*.weight": "a.*", "0.weight": "b"}, "2 rules for the parameter 0.weight"),
        ({"*.weight": "a.*", "*.bias": "b.*"}, r"fit no parameter: \*.bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            HfAdapter(model, rules=rules, repeats={}, config={})


def test_a_model_that_llama_cannot_be_is_refused(shrunk: Any) -> None:
    config = shrunk(llama3_8b)
    config.norm = RMSNorm.Config(eps=1e-6)
    with pytest.raises(ValueError, match="different eps"):
        config.hf_adapter()


def test_a_model_that_qwen3_cannot_be_is_refused(shrunk: Any) -> None:
    config = shrunk(qwen3_8b)
    config.block.attention.qk_norm.eps = 1e-5
    with pytest.raises(ValueError, match="different eps"):
        config.hf_adapter()
    config.block.attention.qk_norm = None
    with pytest.raises(ValueError, match=r"rules that fit no parameter: layers\.\*\.attention\.k_norm\.weight"):
        config.hf_adapter()


def test_shards_are_renamed_as_they_are(run_ranks: Callable[..., list[Any]], shrunk: Any) -> None:
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
