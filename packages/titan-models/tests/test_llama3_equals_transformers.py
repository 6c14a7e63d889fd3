"""Logits and gradients equal those of transformers' `LlamaForCausalLM` with the same weights, through the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from titan_models import Rope
from titan_models.llama3 import Llama3, llama3_1b, llama3_3b, llama3_8b, llama3_405b, llama3_debug
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

FLAVORS = [llama3_debug, llama3_1b, llama3_3b, llama3_8b, llama3_405b]
LENGTH = 96  # three times the shrunk original length


class InDouble(TorchFunctionMode):
    """Compute in fp64 what the reference insists on computing in fp32: norms, rope, softmax."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args, kwargs = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return function(*args, **kwargs)


def reference(model: Llama3, dtype: torch.dtype) -> Any:
    adapter = model.config.hf_adapter()
    config = transformers.LlamaConfig.from_dict(adapter.hf_config())
    config._attn_implementation = "eager"
    llama = transformers.LlamaForCausalLM(config).to(dtype)
    missing, unexpected = llama.load_state_dict(adapter.to_hf(model.state_dict()), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.head is None else [])
    return llama


@pytest.fixture
def batch() -> dict[str, Tensor]:
    tokens = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "positions": torch.arange(LENGTH).expand(2, LENGTH)}


@pytest.mark.parametrize("flavor", FLAVORS)
def test_logits_equal_in_fp32(flavor: Any, shrunk: Any, made: Any, batch: dict[str, Tensor]) -> None:
    model = made(shrunk(flavor))
    with torch.no_grad():
        theirs = reference(model, torch.float32)(batch["tokens"]).logits
        torch.testing.assert_close(model(**batch), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_logits_and_gradients_equal_in_fp64(flavor: Any, shrunk: Any, made: Any, batch: dict[str, Tensor]) -> None:
    model = made(shrunk(flavor), torch.float64)
    llama = reference(model, torch.float64)
    with InDouble():
        theirs = llama(batch["tokens"]).logits
    ours = model(**batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for logits in (ours, theirs):
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten()).backward()
    adapter = model.config.hf_adapter()
    gradients = adapter.to_hf({name: parameter.grad for name, parameter in model.named_parameters()})
    expected = {name: parameter.grad for name, parameter in llama.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-10 * expected[name].norm() + 1e-13, name


def test_logits_equal_without_scaling_and_with_other_theta(shrunk: Any, made: Any, batch: dict[str, Tensor]) -> None:
    config = shrunk(llama3_8b)
    config.rope = Rope.Config(dim=8, theta=10_000.0)
    model = made(config, torch.float64)
    with torch.no_grad(), InDouble():
        theirs = reference(model, torch.float64)(batch["tokens"]).logits
    torch.testing.assert_close(model(**batch), theirs, rtol=0, atol=1e-9)


def test_logits_equal_far_from_the_start(shrunk: Any, made: Any, batch: dict[str, Tensor]) -> None:
    model = made(shrunk(llama3_1b), torch.float64)
    batch["positions"] = batch["positions"] + 900
    with torch.no_grad(), InDouble():
        theirs = reference(model, torch.float64)(batch["tokens"], position_ids=batch["positions"]).logits
    torch.testing.assert_close(model(**batch), theirs, rtol=0, atol=1e-9)


def test_positions_shifted_for_keys_alone_are_noticed(
    shrunk: Any, made: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rope is relative: shifting queries and keys changes nothing, shifting one of them must."""
    model = made(shrunk(llama3_8b), torch.float64)
    with torch.no_grad(), InDouble():
        theirs = reference(model, torch.float64)(batch["tokens"]).logits
    forward = Rope.forward
    monkeypatch.setattr(Rope, "forward", lambda self, positions, dtype: forward(self, positions + 1, dtype))
    assert (model(**batch) - theirs).abs().max() < 1e-9
    monkeypatch.setattr(Rope, "forward", lambda self, positions, dtype: forward(self, positions * 2, dtype))
    assert (model(**batch) - theirs).abs().max() > 1e-4


def test_a_swapped_rotation_is_noticed(
    shrunk: Any, made: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs of features are halves of a head, not neighbours."""
    model = made(shrunk(llama3_8b))
    theirs = reference(model, torch.float32)(batch["tokens"]).logits

    def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)

    monkeypatch.setattr("titan_models.attention.rotate", neighbours)
    assert (model(**batch) - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("flavor", [llama3_1b, llama3_8b])
def test_weights_come_in_from_transformers(flavor: Any, shrunk: Any, batch: dict[str, Tensor]) -> None:
    config = shrunk(flavor)
    adapter = config.hf_adapter()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(adapter.hf_config()))
    model = config.build()
    model.load_state_dict(adapter.from_hf(llama.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), llama(batch["tokens"]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flavor", [llama3_1b, llama3_8b])
def test_an_exported_folder_loads_as_it_is(
    flavor: Any, shrunk: Any, made: Any, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    model = made(shrunk(flavor))
    adapter = model.config.hf_adapter()
    save_file(adapter.to_hf(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(adapter.hf_config()))
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), llama(batch["tokens"]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_rope_frequencies_have_the_bits_of_transformers(flavor: Any) -> None:
    config = flavor()
    hf_config = transformers.LlamaConfig.from_dict(config.hf_adapter().hf_config())
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config).inv_freq
    assert torch.equal(config.rope.build().frequencies, theirs)
