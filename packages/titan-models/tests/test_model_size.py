"""Parameter and FLOP counts, compared with published numbers, manual counts and PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from titan_models import Flops
from titan_models.deepseek import (
    deepseek_debug,
    deepseek_v2_236b,
    deepseek_v2_lite_16b,
    deepseek_v3_671b,
    deepseek_v3_debug,
)
from titan_models.gpt_oss import gpt_oss_20b, gpt_oss_120b, gpt_oss_debug
from titan_models.llama3 import llama3_1b, llama3_3b, llama3_8b, llama3_70b, llama3_405b, llama3_debug
from titan_models.llama4 import llama4_debug, llama4_maverick, llama4_scout
from titan_models.model_size import count_flops_per_token
from titan_models.moe import ForLoop, MoE
from titan_models.qwen3 import (
    qwen3_0_6b,
    qwen3_1_7b,
    qwen3_4b,
    qwen3_8b,
    qwen3_14b,
    qwen3_30b_a3b,
    qwen3_32b,
    qwen3_235b_a22b,
    qwen3_debug,
    qwen3_moe_debug,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PARAMETERS = {
    llama3_debug: 6_163_712,
    llama3_1b: 1_235_814_400,
    llama3_3b: 3_212_749_824,
    llama3_8b: 8_030_261_248,
    llama3_70b: 70_553_706_496,
    llama3_405b: 405_853_388_800,
    llama4_debug: 15_017_216,
    llama4_scout: 107_769_861_120,
    llama4_maverick: 400_711_848_960,
    qwen3_debug: 5_246_592,
    qwen3_0_6b: 596_049_920,
    qwen3_1_7b: 1_720_574_976,
    qwen3_4b: 4_022_468_096,
    qwen3_8b: 8_190_735_360,
    qwen3_14b: 14_768_307_200,
    qwen3_32b: 32_762_123_264,
    qwen3_moe_debug: 11_681_408,
    qwen3_30b_a3b: 30_532_122_624,
    qwen3_235b_a22b: 235_093_634_560,
    deepseek_debug: 33_014_016,
    deepseek_v3_debug: 7_676_800,
    deepseek_v2_lite_16b: 15_706_484_224,
    deepseek_v2_236b: 235_741_434_880,
    deepseek_v3_671b: 671_026_404_352,
    gpt_oss_debug: 81_489_440,
    gpt_oss_20b: 20_914_757_184,
    gpt_oss_120b: 116_829_156_672,
}


@pytest.mark.parametrize("flavor", PARAMETERS)
def test_flavors_have_the_published_number_of_parameters(flavor: Any) -> None:
    assert flavor().num_parameters() == PARAMETERS[flavor]


def test_flops_of_the_8b_model_equal_a_manual_count() -> None:
    """6 x (parameters without embedding and norms), and 6 L H (K + V) T for attention, or half of it if causal."""
    matmul = 8_030_261_248 - 128_256 * 4096 - (2 * 32 + 1) * 4096
    attention = 6 * 32 * 32 * (128 + 128) * 8192
    assert llama3_8b().flops_per_token(8192) == Flops(6 * matmul + attention, 6 * matmul + attention // 2)


def test_a_tied_head_counts_in_flops() -> None:
    matmul = 1_235_814_400 - (2 * 16 + 1) * 2048  # the embedding is the matrix of the head, used once
    assert llama3_1b().flops_per_token(1).full == 6 * matmul + 6 * 16 * 32 * 128


def test_active_parameters_exclude_experts_that_a_token_is_not_routed_to() -> None:
    expert = 3 * 768 * 2048
    assert qwen3_30b_a3b().num_active_parameters() == 30_532_122_624 - 48 * (128 - 8) * expert
    assert qwen3_8b().num_active_parameters() == qwen3_8b().num_parameters()
    matmul = qwen3_30b_a3b().num_active_parameters() - 151_936 * 2048 - (2 * 48 + 1) * 2048 - 48 * 2 * 128
    assert qwen3_30b_a3b().flops_per_token(1).full == 6 * matmul + 6 * 48 * 32 * (128 + 128)


@pytest.mark.parametrize(
    "flavor",
    [
        llama3_debug,
        llama3_1b,
        qwen3_0_6b,
        qwen3_8b,
        qwen3_30b_a3b,
        deepseek_v2_lite_16b,
        deepseek_v3_671b,
        llama4_scout,
        llama4_maverick,
        gpt_oss_20b,
    ],
)
def test_flops_equal_the_count_of_pytorch(flavor: Any, shrunk: Any, build_model: Any) -> None:
    config = shrunk(flavor)
    for block in config.blocks():
        if isinstance(block.feed_forward, MoE.Config):
            block.feed_forward.experts.kernel = ForLoop.Config()  # PyTorch counts nothing for grouped_mm
    model = build_model(config)
    tokens = torch.randint(97, (2, 24))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, torch.arange(24).expand(2, 24)).logsumexp(-1).mean().backward()
    assert counter.get_total_flops() == model.config.flops_per_token(24).full * tokens.numel()


def test_a_module_without_a_flop_count_is_an_error_with_its_name(shrunk: Any) -> None:
    model = shrunk(llama3_8b).on_meta()
    model.layers[2].feed_forward.up_proj = nn.Linear(48, 80)
    with pytest.raises(ValueError, match=r"must be a titan_models.Layer.*layers\.2\.feed_forward\.up_proj, a Linear"):
        count_flops_per_token(model, 8)
