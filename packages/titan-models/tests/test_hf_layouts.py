"""Layout transforms between models and Hugging Face checkpoints are exact in both directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from titan_models import HfAdapter, HfTensor, NestedCheckpoint
from titan_models.hugging_face.layout_transforms import Alternating, Halves, LayoutTransform, NeighborPairs, Transposed
from torch import Tensor, nn

GATE, UP = torch.arange(24.0).view(2, 4, 3), 100 + torch.arange(24.0).view(2, 4, 3)  # [expert, out, in]


class Experts(nn.Module):
    """3-D weights, and a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Parameter(GATE.clone()), nn.Parameter(UP.clone())
        self.register_buffer("balance", torch.arange(2.0))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)


def adapter(rule: str | HfTensor, **options: Any) -> HfAdapter:
    rules = {("gate", "up"): rule, "balance": "balance"}
    return HfAdapter(Experts(), rules=rules, repeats={}, config={}, **options)


@pytest.mark.parametrize(
    ("transforms", "number"),
    [
        ([Halves(dim=-2)], lambda e, row, column: (GATE if row < 4 else UP)[e, row % 4, column]),
        ([Alternating(dim=-2)], lambda e, row, column: (UP if row % 2 else GATE)[e, row // 2, column]),
        ([Halves(dim=-2), Transposed()], lambda e, row, column: (GATE if column < 4 else UP)[e, column % 4, row]),
        ([Alternating(dim=-2), Transposed()], lambda e, row, column: (UP if column % 2 else GATE)[e, column // 2, row]),
        ([Transposed(), Halves(dim=-1)], lambda e, row, column: (GATE if column < 4 else UP)[e, column % 4, row]),
    ],
)
def test_two_weights_are_joined_to_one_tensor(transforms: list[LayoutTransform], number: Any) -> None:
    converter = adapter(HfTensor("mlp.gate_up", *transforms))
    state = Experts().state_dict()
    theirs = converter.to_hf(state)["mlp.gate_up"]
    for index in torch.cartesian_prod(*map(torch.arange, theirs.shape)):
        assert theirs[tuple(index)] == number(*index.tolist())
    back = converter.from_hf(converter.to_hf(state))
    assert list(back) == ["gate", "up", "balance"]
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_transforms_apply_to_single_matrices_of_split_weights() -> None:
    converter = adapter(HfTensor("mlp.#.gate_up", Halves(dim=-2), Transposed()))
    theirs = converter.to_hf(Experts().state_dict())
    assert list(theirs) == ["mlp.0.gate_up", "mlp.1.gate_up", "balance"]
    assert torch.equal(theirs["mlp.1.gate_up"], torch.cat([GATE[1], UP[1]]).T)
    assert torch.equal(converter.from_hf(theirs)["up"], UP)


@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.parametrize("head_dim", [8, 24])
def test_neighbor_pairs_interleaves_the_rope_features(head_dim: int, columns: Any) -> None:
    model = nn.ParameterDict({"q": torch.rand(24, *columns)})
    rules = {"q": HfTensor("q_proj", NeighborPairs(head_dim))}
    converter = HfAdapter(model, rules=rules, repeats={}, config={})
    own = model["q"].detach()
    theirs = converter.to_hf({"q": own})["q_proj"]
    for begin in range(0, 24, head_dim):
        for i in range(head_dim // 2):
            assert torch.equal(theirs[begin + 2 * i], own[begin + i])
            assert torch.equal(theirs[begin + 2 * i + 1], own[begin + i + head_dim // 2])
    assert torch.equal(converter.from_hf({"q_proj": theirs})["q"], own)


def test_neighbor_pairs_rejects_incomplete_heads() -> None:
    rules = {"q": HfTensor("q_proj", NeighborPairs(head_dim=16))}
    with pytest.raises(ValueError, match=r"multiple of NeighborPairs\.head_dim \(16\), got 24"):
        HfAdapter(nn.ParameterDict({"q": torch.rand(24, 3)}), rules=rules, repeats={}, config={})


def test_persistent_buffers_have_their_own_names_and_dtypes() -> None:
    converter = adapter(HfTensor("gate_up", Halves(dim=-2)))
    state = {name: tensor.bfloat16() for name, tensor in Experts().state_dict().items()} | {"balance": torch.rand(2)}
    theirs = converter.to_hf(state)
    assert theirs["balance"] is state["balance"]
    assert converter.from_hf(theirs)["balance"].dtype == torch.float32
    del state["balance"]
    with pytest.raises(ValueError, match="missing: balance"):
        converter.to_hf(state)


def test_tensors_with_an_ignored_prefix_are_skipped() -> None:
    converter = adapter(HfTensor("gate_up", Halves(dim=-2)), ignored=("layers.2.",))
    theirs: dict[str, Tensor] = converter.to_hf(Experts().state_dict())
    theirs["layers.2.eh_proj.weight"] = torch.zeros(3, dtype=torch.float16)
    assert converter.from_hf(theirs).keys() == Experts().state_dict().keys()
    theirs["layers.20.eh_proj.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"unexpected: layers\.20\.eh_proj\.weight"):
        converter.from_hf(theirs)


def test_a_nested_checkpoint_is_read_with_its_prefix() -> None:
    converter = adapter(
        HfTensor("gate_up", Halves(dim=-2)), nested=NestedCheckpoint("language_model.", others=("vision.",))
    )
    alone = converter.to_hf(Experts().state_dict())
    held = {f"language_model.{name}": tensor for name, tensor in alone.items()} | {"vision.patch": torch.zeros(1)}
    assert converter.from_hf(held).keys() == converter.from_hf(alone).keys() == Experts().state_dict().keys()
    for state, unexpected in [
        (alone | {"vision.patch": torch.zeros(1)}, r"vision\.patch"),  # without the prefix there are no other modules
        (held | {"audio.patch": torch.zeros(1)}, r"audio\.patch"),
    ]:
        with pytest.raises(ValueError, match=f"unexpected: {unexpected}"):
            converter.from_hf(state)


def test_rules_for_joined_weights_are_checked() -> None:
    for rules, message in [
        ({("gate", "missing"): "a", "up": "b", "balance": "c"}, "got a rule for gate and missing"),
        ({("gate", "up"): "a", "up": "b", "balance": "c"}, "exactly one rule, got 2 for up"),
        ({("gate", "balance"): HfTensor("a", Halves(dim=-1)), "up": "b"}, "must get two tensors of one shape"),
        (
            {("gate", "up"): HfTensor("a", Transposed()), "balance": "c"},
            "must give one tensor, got 2 for a from gate, up",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            HfAdapter(Experts(), rules=rules, repeats={}, config={})
