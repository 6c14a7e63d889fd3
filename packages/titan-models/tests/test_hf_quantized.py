"""Quantized weights are dequantized exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from titan_models import HfAdapter, HfTensor
from titan_models.hugging_face.layout_transforms import Alternating, Halves, LayoutTransform, Transposed
from torch import Tensor, nn

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def fp8_adapter(rows: int, columns: int, name: str = "proj.weight") -> HfAdapter:
    model = nn.ParameterDict({"norm": torch.rand(5), "proj": torch.rand(rows, columns)})
    return HfAdapter(model, rules={"norm": "norm.weight", "proj": name}, repeats={}, config={"model_type": "x"})


def fp8_checkpoint(rows: int, columns: int, block: tuple[int, int], name: str = "proj.weight") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "norm.weight": torch.ones(5, dtype=torch.bfloat16),
        name: torch.randn(rows, columns, generator=generator).mul(100).to(torch.float8_e4m3fn),
        f"{name}_scale_inv": torch.rand(math.ceil(rows / block[0]), math.ceil(columns / block[1]), generator=generator),
    }


@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(256, 384, (128, 128)), (200, 130, (128, 128)), (64, 7, (128, 128)), (12, 20, (4, 16)), (130, 260, (1, 128))],
)
def test_fp8_blocks_are_multiplied_by_their_scales(rows: int, columns: int, block: tuple[int, int]) -> None:
    """Compared with a loop in fp64 over all numbers, with partial blocks at the edges."""
    adapter, stored = fp8_adapter(rows, columns), fp8_checkpoint(rows, columns, block)
    config = {"model_type": "x", "quantization_config": {"quant_method": "fp8", "weight_block_size": [*block]}}
    (mapping,) = (mapping for mapping in adapter.find(stored, config) if mapping.is_quantized)
    (found,) = mapping.from_hf([stored[name] for name in mapping.hf_names])
    weight, scales = stored["proj.weight"].double(), stored["proj.weight_scale_inv"].double()
    expected = [
        [weight[r, c].item() * scales[r // block[0], c // block[1]].item() for c in range(columns)] for r in range(rows)
    ]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_fp8_dequantization_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the judge of this test")
    stored = fp8_checkpoint(256, 384, (128, 128))
    judge = transformers.integrations.finegrained_fp8.Fp8Dequantize(None)
    expected = judge._dequantize_one(stored["proj.weight"], stored["proj.weight_scale_inv"], torch.float32)
    assert torch.equal(fp8_adapter(256, 384).from_hf(stored)["proj"], expected)


def test_fp8_experts_are_stacked() -> None:
    model = nn.ParameterDict({"experts": torch.rand(3, 130, 40)})
    adapter = HfAdapter(model, rules={"experts": "experts.#.weight"}, repeats={}, config={})
    stored: dict[str, Tensor] = {}
    for expert in range(3):
        stored |= fp8_checkpoint(130, 40, (128, 128), f"experts.{expert}.weight")
        del stored["norm.weight"]
    found = adapter.from_hf(stored)["experts"]
    assert found.shape == (3, 130, 40)
    scale = stored["experts.2.weight_scale_inv"][1, 0]
    assert torch.equal(found[2, 129], stored["experts.2.weight"][129].float() * scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj.weight_scale_inv": torch.rand(2, 2)}, r"scales \[2, 2\] \(expected \[2, 3\]\)"),
        ({"proj.weight": torch.rand(256, 384)}, r"got a weight \[256, 384\] of torch\.float32"),
        ({"proj.weight_scale": torch.rand(1)}, r"unexpected: proj\.weight_scale"),
        ({"proj.weight_scale_inv": torch.ones(2, 3, dtype=torch.int32)}, r"scales \[2, 3\] .* of torch\.int32"),
    ],
)
def test_inconsistent_fp8_weights_are_rejected(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp8_adapter(256, 384).find(fp8_checkpoint(256, 384, (128, 128)) | change)


def test_tied_weights_must_not_be_quantized() -> None:
    model = nn.ParameterDict({"norm": torch.rand(5), "proj": torch.rand(256, 384)})
    rules = {"norm": "norm.weight", "proj": "proj.weight"}
    adapter = HfAdapter(model, rules, repeats={"head.weight": "proj.weight"}, config={})
    stored = fp8_checkpoint(256, 384, (128, 128), "head.weight") | {"proj.weight": torch.rand(256, 384).bfloat16()}
    with pytest.raises(ValueError, match=r"must not be quantized.*got head\.weight and proj\.weight"):
        adapter.find(stored)


def test_fp8_weights_without_scales_are_rejected() -> None:
    stored = fp8_checkpoint(256, 384, (128, 128))
    del stored["proj.weight_scale_inv"]
    with pytest.raises(ValueError, match=r"torch\.float8_e4m3fn"):
        fp8_adapter(256, 384).find(stored)


def mxfp4_checkpoint(num_experts: int, rows: int, columns: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (num_experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(100, 150, (num_experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return {"gate_up_blocks": blocks, "gate_up_scales": exponents}


def mxfp4_adapter(num_experts: int, rows: int, columns: int, *transforms: LayoutTransform) -> HfAdapter:
    halves = {name: torch.rand(num_experts, rows // 2, columns) for name in ("gate", "up")}
    rules = {("gate", "up"): HfTensor("gate_up", *transforms)}
    return HfAdapter(nn.ParameterDict(halves), rules=rules, repeats={}, config={})


def mxfp4_number(stored: dict[str, Tensor], expert: int, row: int, column: int) -> float:
    byte = stored["gate_up_blocks"][expert, row, column // 32, column % 32 // 2].item()
    code = byte >> 4 if column % 2 else byte & 15
    sign = -1.0 if code & 8 else 1.0
    return sign * FP4[code & 7] * 2.0 ** (stored["gate_up_scales"][expert, row, column // 32].item() - 127)


@pytest.mark.parametrize(
    ("joined", "row_of"), [(Alternating(dim=-2), lambda r, up: 2 * r + up), (Halves(dim=-2), lambda r, up: r + 6 * up)]
)
def test_mxfp4_blocks_are_dequantized_exactly(joined: LayoutTransform, row_of: Any) -> None:
    """Compared with a loop over all numbers."""
    stored = mxfp4_checkpoint(3, 12, 64)
    found = mxfp4_adapter(3, 12, 64, joined, Transposed()).from_hf(stored)
    for up, name in enumerate(("gate", "up")):
        expected = [
            [[mxfp4_number(stored, e, row_of(r, up), c) for c in range(64)] for r in range(6)] for e in range(3)
        ]
        assert torch.equal(found[name].double(), torch.tensor(expected, dtype=torch.float64))


def test_mxfp4_dequantization_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the judge of this test")
    stored = mxfp4_checkpoint(4, 96, 128)
    convert = transformers.integrations.mxfp4.convert_moe_packed_tensors
    expected = convert(stored["gate_up_blocks"], stored["gate_up_scales"], dtype=torch.float32)
    adapter = mxfp4_adapter(4, 96, 128, Alternating(dim=-2), Transposed())
    assert torch.equal(adapter.to_hf(adapter.from_hf(stored))["gate_up"], expected)


def test_mxfp4_is_read_expert_by_expert() -> None:
    stored = mxfp4_checkpoint(4, 96, 128)
    mappings = mxfp4_adapter(4, 96, 128, Alternating(dim=-2), Transposed()).find(stored)
    assert [mapping.own for mapping in mappings] == [(("gate", expert), ("up", expert)) for expert in range(4)]
    assert all(tensor.shape == (48, 128) for tensor in mappings[3].from_hf([*stored.values()]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up_scales": torch.zeros(3, 12, 1, dtype=torch.uint8)}, r"exponents \[3, 12, 1\]"),
        ({"gate_up_blocks": torch.zeros(3, 12, 2, 16, dtype=torch.int16)}, r"of torch\.int16"),
        ({"gate_up": torch.zeros(3, 64, 12)}, "got gate_up both quantized and not"),
    ],
)
def test_inconsistent_mxfp4_weights_are_rejected(change: dict[str, Tensor], message: str) -> None:
    adapter = mxfp4_adapter(3, 12, 64, Alternating(dim=-2), Transposed())
    with pytest.raises(ValueError, match=message):
        adapter.find(mxfp4_checkpoint(3, 12, 64) | change)


def test_mxfp4_of_a_wrong_size_is_rejected() -> None:
    adapter = mxfp4_adapter(3, 12, 64, Alternating(dim=-2), Transposed())
    with pytest.raises(ValueError, match=r"gate_up \[3, 96, 12\] instead of \[3, 64, 12\]"):
        adapter.find(mxfp4_checkpoint(3, 12, 96))
    without = mxfp4_checkpoint(3, 12, 64)
    del without["gate_up_scales"]
    with pytest.raises(ValueError, match=r"missing: gate_up; unexpected: gate_up_blocks"):
        adapter.find(without)
