"""Multi-token prediction (MTP): equal to the modules of transformers, independent of packing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from titan_models.deepseek import DeepSeek, deepseek_v3_671b
from titan_models.moe import ForLoop
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm


@pytest.fixture
def mtp_config(shrunk: Any) -> DeepSeek.Config:
    config = shrunk(deepseek_v3_671b)
    config.mtp = True
    return config


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(97, (2, 65), generator=torch.Generator().manual_seed(0))
    return {"tokens": ids[:, :-1], "positions": torch.arange(64).expand(2, 64), "next_tokens": ids[:, 1:]}


class Theirs(torch.nn.Module):
    """The decoder of transformers with one more layer, used as the block of its `MtpLayer`."""

    def __init__(self, config: DeepSeek.Config, state: dict[str, Tensor]) -> None:
        super().__init__()
        count = config.num_layers
        fields = config.hf_adapter().hf_config() | {"num_hidden_layers": count + 1}
        hf_config = DeepseekV3Config(**fields, attn_implementation="eager", experts_implementation="eager")
        self.all = DeepseekV3ForCausalLM(hf_config).double()
        self.all.config.num_hidden_layers = count  # its forward excludes the last layer
        self.mtp = MtpLayer(hf_config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, count).double()
        self.mtp.mtp_block = self.all.model.layers[count]
        own = self.named_tensors(count)
        assert own.keys() == stacked(state).keys()
        with torch.no_grad():
            for name, tensor in stacked(state).items():
                own[name].copy_(tensor)

    def named_tensors(self, count: int) -> dict[str, Tensor]:
        """Return all weights by their names in checkpoints, with stacked experts."""
        names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
        mtp = {
            f"model.layers.{count}.{hf_name}.weight": getattr(self.mtp, name).weight for name, hf_name in names.items()
        }
        return {**self.all.state_dict(keep_vars=True), **mtp}

    def forward(self, tokens: Tensor, positions: Tensor, next_tokens: Tensor) -> tuple[Tensor, Tensor]:
        model, length = self.all.model, tokens.shape[1]
        hidden = model(tokens).last_hidden_state
        mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        rotation = model.rotary_emb(hidden, position_ids=positions)
        mtp = self.mtp(model.embed_tokens(next_tokens), hidden, rotation, mask, positions, None)
        return self.all.lm_head(hidden), self.all.lm_head(mtp)


def stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the experts of a state dict in checkpoint layout, as transformers does in memory."""
    parts: dict[str, dict[int, Tensor]] = {}
    result = {}
    for name, tensor in state.items():
        if ".experts." not in name:
            result[name] = tensor
            continue
        stem, number, projection, _ = name.rsplit(".", 3)
        parts.setdefault(f"{stem}.{projection}", {})[int(number)] = tensor
    whole = {name: torch.stack([of[number] for number in sorted(of)]) for name, of in parts.items()}
    for name, tensor in whole.items():
        if name.endswith("gate_proj"):
            up = whole[name.replace("gate_proj", "up_proj")]
            result[name.replace("gate_proj", "gate_up_proj")] = torch.cat((tensor, up), 1)
        elif name.endswith("down_proj"):
            result[name] = tensor
    return result


@pytest.mark.parametrize("seed", [1, 2])
def test_logits_and_gradients_equal_transformers(
    mtp_config: DeepSeek.Config, seed: int, build_model: Any, in_fp64: Any, batch: dict[str, Tensor]
) -> None:
    model, adapter = build_model(mtp_config, torch.float64, seed), mtp_config.hf_adapter()
    theirs = Theirs(mtp_config, adapter.to_hf(model.state_dict()))
    with in_fp64():
        next_logits, mtp_logits = theirs(**batch)
    logits = model(**batch)
    torch.testing.assert_close(logits, torch.stack((next_logits, mtp_logits), 1), rtol=0, atol=1e-9)
    for both in (logits.unbind(1), (next_logits, mtp_logits)):
        losses = [functional.cross_entropy(each.flatten(0, 1), batch["next_tokens"].flatten()) for each in both]
        (losses[0] + 0.3 * losses[1]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = stacked(adapter.to_hf({**model.state_dict(), **gradients}))
    for name, parameter in theirs.named_tensors(mtp_config.num_layers).items():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)
    assert sum(parameter.grad is not None for parameter in theirs.parameters()) == sum(
        not name.endswith("bias") for name in found
    )


def test_without_next_tokens_the_model_equals_one_without_mtp(
    mtp_config: DeepSeek.Config, build_model: Any, batch: dict[str, Tensor]
) -> None:
    model, plain_config = build_model(mtp_config, torch.float64), copy.deepcopy(mtp_config)
    plain_config.mtp = False
    plain = plain_config.build().double()
    plain.load_state_dict(plain_config.hf_adapter().from_hf(mtp_config.hf_adapter().to_hf(model.state_dict())))
    mtp = model(**batch)
    next_tokens = batch.pop("next_tokens")
    assert torch.equal(model(**batch), plain(**batch))
    torch.testing.assert_close(mtp[:, 0], plain(**batch), rtol=0, atol=1e-10)  # the head had twice as many tokens
    with pytest.raises(ValueError, match="next_tokens must be None for a model without multi-token prediction"):
        plain(**batch, next_tokens=next_tokens)


def test_mtp_logits_of_packed_documents_equal_each_document_alone(
    mtp_config: DeepSeek.Config, build_model: Any, packed: dict[str, Tensor]
) -> None:
    model = build_model(mtp_config, torch.float64)
    next_tokens = packed["tokens"].roll(-1, 1)
    whole = model(**packed, next_tokens=next_tokens)
    for row, ids in enumerate(packed["document_ids"]):
        for document in ids.unique():
            where = ids == document
            alone = model(
                packed["tokens"][row, where][None],
                packed["positions"][row, where][None],
                None,
                next_tokens[row, where][None],
            )
            torch.testing.assert_close(whole[row][:, where], alone[0], rtol=0, atol=1e-10)


def test_a_checkpoint_may_repeat_embedding_and_head_in_the_mtp_layer(
    mtp_config: DeepSeek.Config, build_model: Any
) -> None:
    adapter, model = mtp_config.hf_adapter(), build_model(mtp_config)
    last = f"model.layers.{mtp_config.num_layers}"
    state = adapter.to_hf(model.state_dict())
    state[f"{last}.embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    state[f"{last}.shared_head.head.weight"] = state["lm_head.weight"].clone()
    for name, tensor in adapter.from_hf(state).items():
        assert torch.equal(tensor, model.state_dict()[name])
    state[f"{last}.shared_head.head.weight"][0] += 1
    with pytest.raises(ValueError, match=r"shared_head\.head\.weight and lm_head\.weight must have the same values"):
        adapter.from_hf(state)


def test_flops_equal_the_count_of_pytorch(
    mtp_config: DeepSeek.Config, build_model: Any, batch: dict[str, Tensor]
) -> None:
    mtp_config.block.feed_forward.experts.kernel = ForLoop.Config()  # PyTorch counts nothing for grouped_mm
    model = build_model(mtp_config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).logsumexp(-1).mean().backward()
    assert counter.get_total_flops() == mtp_config.flops_per_token(64).full * batch["tokens"].numel()
