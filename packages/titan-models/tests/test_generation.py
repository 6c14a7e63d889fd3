"""Generation with a KV cache equals a full forward for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from titan_models import AttentionCore, Decoder, Flex, KVCache, MaskModifier, Sdpa, generate
from titan_models.deepseek import deepseek_v2_236b, deepseek_v3_671b
from titan_models.gpt_oss import gpt_oss_20b
from titan_models.llama3 import llama3_1b, llama3_8b
from titan_models.llama4 import llama4_maverick, llama4_scout
from titan_models.qwen3 import qwen3_8b, qwen3_30b_a3b
from torch import Tensor

FAMILIES = [llama3_1b, qwen3_8b, qwen3_30b_a3b, deepseek_v2_236b, deepseek_v3_671b, gpt_oss_20b, llama4_scout]
FAMILIES += [llama4_maverick]
PROMPT = [5, 81, 3, 3, 40, 17, 96, 0, 22, 64]
LENGTH = 45  # past the windows and chunks of 16, and the original length of 32


def full_forward(model: Decoder, tokens: list[int]) -> Tensor:
    """Return the logits of all tokens, `[T, V]`, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0]


def greedy_without_cache(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Return greedily decoded tokens, by a full forward for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_forward(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def with_large_weights(model: Decoder) -> Decoder:
    """Scale up the weights so that the next token depends on all earlier tokens, not on the last alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.mul_(0.05)
            elif "_proj" in name or "embedding" in name:
                parameter.mul_(0.24 / parameter.std())
    return model


@pytest.fixture
def model(shrunk: Any, build_model: Any) -> Decoder:
    return with_large_weights(build_model(shrunk(llama3_8b), torch.float64))


def test_generate_restores_the_mode_of_each_module_also_after_an_error(model):
    model.train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    generate(model, [PROMPT], max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    model.head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        generate(model, [PROMPT], max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    assert set(before) == {True, False}


CORES = [(flavor, Sdpa.Config()) for flavor in FAMILIES]
CORES += [pytest.param(llama4_scout, Flex.Config(block_size=16), marks=pytest.mark.full)]
CORES += [(llama3_1b, Flex.Config(block_size=16))]


@pytest.mark.parametrize(("flavor", "core"), CORES)
def test_logits_with_a_kv_cache_equal_a_full_forward(flavor: Any, core: Any, shrunk: Any, build_model: Any) -> None:
    """With one token or several per call, and each type of layer."""
    config = shrunk(flavor)
    for block in config.blocks():
        block.attention.core = core
    model = with_large_weights(build_model(config, torch.float64))
    tokens = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions, documents = torch.arange(LENGTH).expand(2, LENGTH), torch.zeros_like(tokens)
    cache, found = KVCache(model, batch_size=2, capacity=LENGTH), []
    with torch.no_grad():
        for start, end in [(0, 10), *((index, index + 1) for index in range(10, 25)), (25, LENGTH)]:
            found.append(cache.extend(*(each[:, start:end] for each in (tokens, positions, documents))))
        torch.testing.assert_close(torch.cat(found, 1), model(tokens, positions), rtol=0, atol=1e-9)


@pytest.mark.parametrize("flavor", FAMILIES)
def test_greedy_decoding_equals_transformers(flavor: Any, shrunk: Any, build_model: Any, reference: Any) -> None:
    model = with_large_weights(build_model(shrunk(flavor), torch.float64, seed=3))
    prompts = torch.tensor([PROMPT, PROMPT[::-1]])
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = reference(model, torch.float64).eval()
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, len(PROMPT) :].tolist()
    found = generate(model, prompts.tolist(), max_new_tokens=LENGTH)
    assert found == expected
    assert len({token for row in found for token in row}) > 5


def test_a_model_with_mtp_generates_next_tokens_only(shrunk: Any, build_model: Any) -> None:
    config = shrunk(deepseek_v3_671b)
    config.mtp = True
    model = with_large_weights(build_model(config, torch.float64))
    assert model.generate([PROMPT], max_new_tokens=15)[0] == greedy_without_cache(model, PROMPT, 15)


def test_prompts_of_different_lengths_do_not_affect_each_other(shrunk: Any, build_model: Any) -> None:
    model = with_large_weights(build_model(shrunk(llama4_scout), torch.float64))
    prompts = [PROMPT, [7], PROMPT * 3, [96, 2]]
    together = model.generate(prompts, max_new_tokens=20)
    assert together == [model.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert together == [greedy_without_cache(model, prompt, 20) for prompt in prompts]


def test_a_sequence_ends_with_its_stop_token(model: Decoder) -> None:
    prompts = [PROMPT, PROMPT[::-1]]
    rows = model.generate(prompts, max_new_tokens=12)
    stop = [rows[0][3], rows[1][5]]
    expected = [row[: min(row.index(token) for token in stop if token in row) + 1] for row in rows]
    assert model.generate(prompts, max_new_tokens=12, stop=stop) == expected
    calls: list[int] = []
    model.register_forward_hook(lambda *args: calls.append(1))
    model.generate([PROMPT], max_new_tokens=12, stop=[rows[0][3]])
    assert len(calls) == rows[0].index(rows[0][3]) + 1  # no forward after the stop token


def test_sampled_tokens_have_the_probabilities_of_transformers_warpers(model: Decoder) -> None:
    """Among the tokens that the logits warpers of transformers keep."""
    logits = full_forward(model, PROMPT)[-1:].float()
    warped = transformers.TemperatureLogitsWarper(0.7)(None, logits)
    warped = transformers.TopPLogitsWarper(0.6)(None, warped)
    rows = 4000
    sampled = generate(model, [PROMPT] * rows, max_new_tokens=1, temperature=0.7, top_p=0.6, seed=5)
    counts = torch.bincount(torch.tensor(sampled).flatten(), minlength=97) / rows
    expected = warped.softmax(-1)[0]
    assert torch.equal(counts > 0, expected > 0)
    assert 1 < (expected > 0).sum() < 97
    assert (counts - expected).abs().max() < 4 * (0.25 / rows) ** 0.5


def test_a_seed_determines_the_sampled_tokens(model: Decoder) -> None:
    def sample(**options: Any) -> list[list[int]]:
        return model.generate([PROMPT], max_new_tokens=20, **options)

    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    for nearly_greedy in ({"temperature": 1e-30}, {"temperature": 1.0, "top_p": 1e-9}):
        assert sample(**nearly_greedy) == sample()


class EverySecond(MaskModifier):
    """A custom mask modifier: queries see keys at an even distance."""

    def __init__(self, config: MaskModifier.Config) -> None: ...

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return (query_position - key_position) % 2 == 0


def test_generate_works_with_a_custom_mask_modifier(shrunk: Any, build_model: Any) -> None:
    config = shrunk(llama3_8b)
    config.block.attention.mask_modifiers = [EverySecond.Config()]
    model = with_large_weights(build_model(config, torch.float64))
    assert model.generate([PROMPT], max_new_tokens=20)[0] == greedy_without_cache(model, PROMPT, 20)


def test_generate_does_not_change_the_model(model: Decoder) -> None:
    before, attributes = full_forward(model, PROMPT), [set(vars(module)) for module in model.modules()]
    model.generate([PROMPT], max_new_tokens=3)
    with pytest.raises(ValueError, match="must be finite"):
        model.head.weight.data[5] = torch.nan
        model.generate([PROMPT], max_new_tokens=3)
    assert model.training
    assert [set(vars(module)) for module in model.modules()] == attributes
    model.head.weight.data[5] = 0
    kept = torch.arange(97) != 5
    assert torch.equal(full_forward(model, PROMPT)[:, kept], before[:, kept])


def test_the_tests_detect_a_cache_with_wrong_positions(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = greedy_without_cache(model, PROMPT, 20)
    assert model.generate([PROMPT], max_new_tokens=20)[0] == expected
    extend = KVCache.extend
    monkeypatch.setattr(KVCache, "extend", lambda self, t, p, d: extend(self, t, p * 0 if t.shape[1] == 1 else p, d))
    assert model.generate([PROMPT], max_new_tokens=20)[0] != expected


def test_invalid_arguments_of_generate_are_rejected_with_a_reason(model: Decoder) -> None:
    for prompts, options, message in [
        ([], {}, r"at least one prompt.*got prompts of \[\] tokens"),
        ([[1], []], {}, r"got prompts of \[1, 0\] tokens"),
        ([[1, 97]], {}, "Token ids must be 0 to 96, got 97 in prompts"),
        ([[1]], {"stop": [-1]}, "got -1 in stop"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1] * 1000], {"max_new_tokens": 25}, r"at most max_seq_len \(1024\), got 1000 \+ 25"),
        ([[1]], {"temperature": 0.0}, "temperature must be finite and > 0, got 0.0.*use None"),
        ([[1]], {"temperature": float("nan")}, "temperature must be .* got nan"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p must be > 0 and at most 1, got 0.0"),
        ([[1]], {"top_p": 0.5}, "top_p must be 1 without a temperature .* got 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(prompts, **{"max_new_tokens": 5, **options})
    with pytest.raises(ValueError, match="meta device"):
        model.config.on_meta().generate([[1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="must be finite"):
        model.config.build().generate([[1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="must hold 3 tokens per sequence, got capacity 2"):
        KVCache(model, batch_size=1, capacity=2).extend(*torch.zeros(3, 1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="must have a module of type AttentionCore"):
        KVCache(torch.nn.Linear(2, 2), batch_size=1, capacity=2)
    assert issubclass(Sdpa, AttentionCore)
