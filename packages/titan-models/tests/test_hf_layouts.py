"""Weights that lie otherwise in Hugging Face's files are brought there and back, number for number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from titan_models import HfAdapter, HfTensor, NestedCheckpoint
from titan_models.hugging_face.layout_transforms import Alternating, Halves, NeighborPairs, Step, Transposed
from torch import Tensor, nn

GATE, UP = torch.arange(24.0).view(2, 4, 3), 100 + torch.arange(24.0).view(2, 4, 3)  # [expert, out, in]


class Experts(nn.Module):
    """3-D weights, and a bias that is state and no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Parameter(GATE.clone()), nn.Parameter(UP.clone())
        self.register_buffer("balance", torch.arange(2.0))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)


def adapter(rule: str | HfTensor, **options: Any) -> HfAdapter:
    rules = {("gate", "up"): rule, "balance": "balance"}
    return HfAdapter(Experts(), rules=rules, repeats={}, config={}, **options)


@pytest.mark.parametrize(
    ("steps", "number"),
    [
        ([Halves(dim=-2)], lambda e, row, column: (GATE if row < 4 else UP)[e, row % 4, column]),
        ([Alternating(dim=-2)], lambda e, row, column: (UP if row % 2 else GATE)[e, row // 2, column]),
        ([Halves(dim=-2), Transposed()], lambda e, row, column: (GATE if column < 4 else UP)[e, column % 4, row]),
        ([Alternating(dim=-2), Transposed()], lambda e, row, column: (UP if column % 2 else GATE)[e, column // 2, row]),
        ([Transposed(), Halves(dim=-1)], lambda e, row, column: (GATE if column < 4 else UP)[e, column % 4, row]),
    ],
)
def test_two_weights_are_one_tensor(steps: list[Step], number: Any) -> None:
    translation = adapter(HfTensor("mlp.gate_up", *steps))
    state = Experts().state_dict()
    theirs = translation.to_hf(state)["mlp.gate_up"]
    for place in torch.cartesian_prod(*map(torch.arange, theirs.shape)):
        assert theirs[tuple(place)] == number(*place.tolist())
    back = translation.from_hf(translation.to_hf(state))
    assert list(back) == ["gate", "up", "balance"]
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_steps_see_one_matrix_of_weights_that_are_taken_apart() -> None:
    translation = adapter(HfTensor("mlp.#.gate_up", Halves(dim=-2), Transposed()))
    theirs = translation.to_hf(Experts().state_dict())
    assert list(theirs) == ["mlp.0.gate_up", "mlp.1.gate_up", "balance"]
    assert torch.equal(theirs["mlp.1.gate_up"], torch.cat([GATE[1], UP[1]]).T)
    assert torch.equal(translation.from_hf(theirs)["up"], UP)


@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.parametrize("head_dim", [8, 24])
def test_pairs_of_a_rope_are_brought_side_by_side(head_dim: int, columns: Any) -> None:
    model = nn.ParameterDict({"q": torch.rand(24, *columns)})
    rules = {"q": HfTensor("q_proj", NeighborPairs(head_dim))}
    translation = HfAdapter(model, rules=rules, repeats={}, config={})
    own = model["q"].detach()
    theirs = translation.to_hf({"q": own})["q_proj"]
    for begin in range(0, 24, head_dim):
        for i in range(head_dim // 2):
            assert torch.equal(theirs[begin + 2 * i], own[begin + i])
            assert torch.equal(theirs[begin + 2 * i + 1], own[begin + i + head_dim // 2])
    assert torch.equal(translation.from_hf({"q_proj": theirs})["q"], own)


def test_rows_that_are_no_whole_heads_are_refused() -> None:
    rules = {"q": HfTensor("q_proj", NeighborPairs(head_dim=16))}
    with pytest.raises(ValueError, match="24 rows in heads of 16"):
        HfAdapter(nn.ParameterDict({"q": torch.rand(24, 3)}), rules=rules, repeats={}, config={})


def test_buffers_that_are_saved_have_names_and_dtypes_of_their_own() -> None:
    translation = adapter(HfTensor("gate_up", Halves(dim=-2)))
    state = {name: tensor.bfloat16() for name, tensor in Experts().state_dict().items()} | {"balance": torch.rand(2)}
    theirs = translation.to_hf(state)
    assert theirs["balance"] is state["balance"]
    assert translation.from_hf(theirs)["balance"].dtype == torch.float32
    del state["balance"]
    with pytest.raises(ValueError, match="lacks balance"):
        translation.to_hf(state)


def test_parts_that_the_model_does_without_are_left_out_by_name() -> None:
    translation = adapter(HfTensor("gate_up", Halves(dim=-2)), ignored=("layers.2.",))
    theirs: dict[str, Tensor] = translation.to_hf(Experts().state_dict())
    theirs["layers.2.eh_proj.weight"] = torch.zeros(3, dtype=torch.float16)
    assert translation.from_hf(theirs).keys() == Experts().state_dict().keys()
    theirs["layers.20.eh_proj.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"has layers\.20\.eh_proj\.weight besides"):
        translation.from_hf(theirs)


def test_a_larger_models_checkpoint_holds_it_under_a_prefix() -> None:
    translation = adapter(
        HfTensor("gate_up", Halves(dim=-2)), inside=NestedCheckpoint("language_model.", others=("vision.",))
    )
    alone = translation.to_hf(Experts().state_dict())
    held = {f"language_model.{name}": tensor for name, tensor in alone.items()} | {"vision.patch": torch.zeros(1)}
    assert translation.from_hf(held).keys() == translation.from_hf(alone).keys() == Experts().state_dict().keys()
    for state, unexpected in [
        (alone | {"vision.patch": torch.zeros(1)}, r"vision\.patch"),  # alone it has no other parts
        (held | {"audio.patch": torch.zeros(1)}, r"audio\.patch"),
    ]:
        with pytest.raises(ValueError, match=f"has {unexpected} besides"):
            translation.from_hf(state)


def test_rules_for_joined_weights_are_checked() -> None:
    for rules, message in [
        ({("gate", "missing"): "a", "up": "b", "balance": "c"}, "gate together with missing"),
        ({("gate", "up"): "a", "up": "b", "balance": "c"}, "2 rules for the parameter up"),
        ({("gate", "balance"): HfTensor("a", Halves(dim=-1)), "up": "b"}, "joins two of one shape"),
        ({("gate", "up"): HfTensor("a", Transposed()), "balance": "c"}, "are 2 tensors after all steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            HfAdapter(Experts(), rules=rules, repeats={}, config={})
