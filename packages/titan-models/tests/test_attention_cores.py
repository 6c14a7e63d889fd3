"""Each core computes `softmax(scale q k^T, masked) v`, compared with a loop over queries in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from titan_models import Chunks, Flex, Mask, MaskModifier, Sdpa, SlidingWindow, Varlen
from torch import Tensor

CORES = [Sdpa.Config(), Flex.Config(block_size=16)]


class EverySecond(MaskModifier):
    """A custom mask modifier: a query sees itself and every second key before it."""

    def __init__(self, config: MaskModifier.Config) -> None:
        pass

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return (query_position - key_position) % 2 == 0


def mask_modifiers(*configs: MaskModifier.Config) -> tuple[MaskModifier, ...]:
    return tuple(config.build() for config in configs)


def sees(mask: Mask, row: int, query: int, key: int) -> bool:
    """Return whether a query sees a key, by all rules: causal, document, window, chunk, even distance."""
    q, k = int(mask.query_positions[row, query]), int(mask.key_positions[row, key])
    if k > q:
        return False
    if mask.query_documents is not None and mask.query_documents[row, query] != mask.key_documents[row, key]:
        return False
    rules = {
        SlidingWindow: lambda modifier: q - k < modifier.size,
        Chunks: lambda modifier: q // modifier.size == k // modifier.size,
        EverySecond: lambda modifier: (q - k) % 2 == 0,
    }
    return all(rules[type(modifier)](modifier) for modifier in mask.mask_modifiers)


FP32 = 2e-5
"""Tolerance of outputs below 4: scores below 4 sum 16 products, outputs 40, with a rounding unit of 6e-8."""


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, sinks: Tensor | None = None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[2] // k.shape[2]
    output = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for row, query, head in itertools.product(*map(range, q.shape[:3])):
        keys = [key for key in range(k.shape[1]) if sees(mask, row, query, key)]
        scores = torch.stack([scale * (q[row, query, head] @ k[row, key, head // group]) for key in keys])
        if sinks is not None:
            scores = torch.cat([scores, sinks[head, None]])
        output[row, query, head] = torch.softmax(scores, 0)[: len(keys)] @ v[row, keys, head // group]
    return output


def tensors(num_queries: int = 40, num_keys: int = 40, num_heads: int = 4, num_kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_queries, num_heads, 16), (num_keys, num_kv_heads, 16), (num_keys, num_kv_heads, 8)]
    return [torch.randn(2, *shape, generator=generator) for shape in shapes]


@pytest.fixture
def masks(packed: dict[str, Tensor]) -> dict[str, Mask]:
    line, positions, documents = torch.arange(40).expand(2, 40), packed["positions"], packed["document_ids"]
    window, chunks, every_second = SlidingWindow.Config(size=7), Chunks.Config(size=9), EverySecond.Config()
    return {
        "causal": Mask.causal(line),
        "documents": Mask.causal(positions, documents),
        "window": Mask.causal(line, mask_modifiers=mask_modifiers(window)),
        "chunks": Mask.causal(line, mask_modifiers=mask_modifiers(chunks)),
        "custom": Mask.causal(line, mask_modifiers=mask_modifiers(every_second)),
        "documents, window": Mask.causal(positions, documents, mask_modifiers(window)),
        "documents, chunks": Mask.causal(positions, documents, mask_modifiers(chunks)),
        "documents, all mask_modifiers": Mask.causal(
            positions, documents, mask_modifiers(window, chunks, every_second)
        ),
    }


@pytest.mark.parametrize("core", CORES, ids=["sdpa", "flex"])
def test_a_core_equals_naive_attention_under_every_mask(core: Any, masks: dict[str, Mask]) -> None:
    attention, (q, k, v) = core.build(), tensors()
    for name, mask in masks.items():
        output = attention(q, k, v, attention.build_mask(mask), 0.3)
        expected = naive(q, k, v, mask, 0.3)
        assert (output - expected).abs().max() < FP32, name


@pytest.mark.parametrize("core", CORES, ids=["sdpa", "flex"])
def test_queries_may_be_a_shard_of_the_sequence(core: Any, packed: dict[str, Tensor]) -> None:
    """As in context parallelism: the first and the last quarter of the queries, and all keys."""
    positions, documents = packed["positions"], packed["document_ids"]
    mine = torch.cat([torch.arange(10), torch.arange(30, 40)])
    attention, (q, k, v) = core.build(), tensors()
    line = torch.arange(40).expand(2, 40)
    masks = [Mask(line[:, mine], line), Mask(positions[:, mine], positions, documents[:, mine], documents)]
    for mask in masks:
        output = attention(q[:, mine], k, v, attention.build_mask(mask), 0.3)
        assert (output - naive(q[:, mine], k, v, mask, 0.3)).abs().max() < FP32


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("core", CORES, ids=["sdpa", "flex"])
def test_key_value_heads_are_shared_by_groups_of_query_heads(
    core: Any, num_kv_heads: int, masks: dict[str, Mask]
) -> None:
    attention, (q, k, v) = core.build(), tensors(num_kv_heads=num_kv_heads)
    mask = masks["documents"]
    output = attention(q, k, v, attention.build_mask(mask), 0.25)
    assert (output - naive(q, k, v, mask, 0.25)).abs().max() < FP32


def test_gradients_of_sdpa_equal_naive_attention(masks: dict[str, Mask]) -> None:
    attention = Sdpa.Config().build()
    for mask in (masks["causal"], masks["documents"]):
        ours, theirs = ([x.double().requires_grad_() for x in tensors(num_kv_heads=1)] for _ in range(2))
        attention(*ours, attention.build_mask(mask), 0.3).square().sum().backward()
        naive(*theirs, mask, 0.3).square().sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_varlen_equals_naive_attention_for_documents_windows_and_chunks(masks: dict[str, Mask]) -> None:
    attention = Varlen.Config().build()
    for name, mask in masks.items():
        if not any(isinstance(modifier, EverySecond) for modifier in mask.mask_modifiers):
            ours, theirs = ([x.double().requires_grad_() for x in tensors()] for _ in range(2))
            outputs = attention(*ours, attention.build_mask(mask), 0.3), naive(*theirs, mask, 0.3)
            torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12, msg=name)
            for output in outputs:
                output.square().sum().backward()
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
def test_the_varlen_kernel_equals_naive_attention(masks: dict[str, Mask]) -> None:
    attention = Varlen.Config().build()
    for name in ("causal", "documents", "window", "documents, window", "documents, chunks"):
        q, k, v = (x.bfloat16().cuda() for x in (*tensors()[:2], tensors()[1]))
        mask = masks[name]
        on_gpu = {key: x.cuda() for key, x in vars(mask).items() if isinstance(x, Tensor)}
        on_gpu["key_positions"] = on_gpu["query_positions"]
        output = attention(q, k, v, attention.build_mask(Mask(**on_gpu, mask_modifiers=mask.mask_modifiers)), 0.3)
        expected = naive(*(x.cpu() for x in (q, k, v)), mask, 0.3)
        torch.testing.assert_close(output.cpu().double(), expected, rtol=0, atol=2e-2, msg=name)


def test_varlen_rejects_unsupported_masks_and_sinks(masks: dict[str, Mask]) -> None:
    attention, line = Varlen.Config().build(), torch.arange(40).expand(2, 40)
    with pytest.raises(ValueError, match=r"Varlen supports only self-attention.* Use Sdpa or Flex"):
        attention.build_mask(Mask(line[:, :10], line))
    with pytest.raises(ValueError, match="SlidingWindow and Chunks, got EverySecond"):
        attention.build_mask(masks["custom"])
    with pytest.raises(ValueError, match="does not support attention sinks"):
        attention(*tensors(), attention.build_mask(masks["causal"]), 0.3, torch.zeros(4))


def test_sdpa_builds_no_mask_for_plain_causal_attention(masks: dict[str, Mask]) -> None:
    attention = Sdpa.Config().build()
    assert attention.build_mask(masks["causal"]) is None
    assert attention.build_mask(masks["documents"]).dtype == torch.bool


def test_the_tests_detect_a_missing_mask_rule(masks: dict[str, Mask], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    expected = {name: naive(q, k, v, mask, 0.3) for name, mask in masks.items() if name != "causal"}
    monkeypatch.setattr(Mask, "rule", lambda self, query, key, *documents: query >= key)
    torch.compiler.reset()  # flex has compiled the rule
    for core, (name, values) in itertools.product(CORES, expected.items()):
        attention = core.build()
        assert (attention(q, k, v, attention.build_mask(masks[name]), 0.3) - values).abs().max() > 1e-3, name


def test_invalid_masks_are_rejected() -> None:
    positions = torch.arange(4)[None]
    with pytest.raises(ValueError, match="SlidingWindow size must be at least 1, got 0"):
        SlidingWindow.Config(size=0).build()
    with pytest.raises(ValueError, match="Chunks size must be at least 1, got -1"):
        Chunks.Config(size=-1).build()
    with pytest.raises(ValueError, match="must be given together, got query_documents alone"):
        Mask(positions, positions, query_documents=positions)


@pytest.fixture
def flex_trains_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enable the backward of FlexAttention on CPUs, which PyTorch rejects but can compute."""
    import torch.nn.attention.flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def naive_lse(q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    q, k = q.double(), k.double()
    group, lse = q.shape[2] // k.shape[2], torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for row, query, head in itertools.product(*map(range, q.shape[:3])):
        seen = [key for key in range(k.shape[1]) if sees(mask, row, query, key)]
        if seen:
            lse[row, query, head] = (scale * k[row, seen, head // group] @ q[row, query, head]).logsumexp(0)
    return lse


@pytest.mark.parametrize("core", CORES, ids=["sdpa", "flex"])
def test_log_sum_exp_and_its_gradient_equal_naive_attention(
    core: Any, masks: dict[str, Mask], flex_trains_on_cpus: None
) -> None:
    attention, weights = core.build(), torch.rand(2, 40, 4, dtype=torch.float64)
    for name in ("causal", "documents", "documents, all mask_modifiers"):
        ours, theirs = ([x.double().requires_grad_() for x in tensors()] for _ in range(2))
        output, lse = attention.with_lse(*ours, attention.build_mask(masks[name]), 0.3)
        expected, expected_lse = naive(*theirs, masks[name], 0.3), naive_lse(*theirs[:2], masks[name], 0.3)
        torch.testing.assert_close((output, lse), (expected, expected_lse), rtol=1e-10, atol=1e-10)
        (output.square().sum() + (weights * lse).sum()).backward()
        (expected.square().sum() + (weights * expected_lse).sum()).backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("core", CORES, ids=["sdpa", "flex"])
def test_attention_sinks_equal_an_additional_key_with_value_zero(
    core: Any, masks: dict[str, Mask], flex_trains_on_cpus: None
) -> None:
    attention, sinks = core.build(), torch.tensor([-2.0, 0.5, 3.0, 30.0], dtype=torch.float64)
    for name in ("causal", "documents, window"):
        ours, theirs = ([x.double().requires_grad_() for x in (*tensors(), sinks.clone())] for _ in range(2))
        output = attention(*ours[:3], attention.build_mask(masks[name]), 0.3, ours[3])
        expected = naive(*theirs[:3], masks[name], 0.3, theirs[3])
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
        output.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("core", CORES, ids=["sdpa", "flex"])
def test_a_query_that_sees_no_key_gets_zeros_and_no_gradient(core: Any, flex_trains_on_cpus: None) -> None:
    """As in ring attention: the keys of another rank, of which 15 queries see none."""
    attention, line = core.build(), torch.arange(40).expand(2, 40)
    mask = Mask(line[:, :20], line[:, 15:35])
    q, k, v = (x.double().requires_grad_() for x in tensors(20, 20))
    output, lse = attention.with_lse(q, k, v, attention.build_mask(mask), 0.3)
    assert (output[:, :15] == 0).all() and (lse[:, :15] == -torch.inf).all() and lse[:, 15:].isfinite().all()
    (output.sum() + lse[:, 15:].sum()).backward()
    assert (q.grad[:, :15] == 0).all() and q.grad[:, 15:].abs().min() > 0
    assert (k.grad[:, 5:] == 0).all() and (v.grad[:, 5:] == 0).all() and v.grad.isfinite().all()


def test_log_sum_exp_is_fp32_for_bf16_inputs(masks: dict[str, Mask]) -> None:
    attention = Sdpa.Config().build()
    output, lse = attention.with_lse(*(x.bfloat16() for x in tensors()), None, 0.3)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
