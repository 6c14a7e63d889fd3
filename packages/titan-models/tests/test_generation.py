"""A model continues token ids, with what it has seen kept, as it would with a full forward for each token."""

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
    """The logits of all tokens, `[T, V]`, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0]


def one_by_one(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, by a full forward for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_forward(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def lively(model: Decoder) -> Decoder:
    """With weights so large that a token depends on all before it, not on the last alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.mul_(0.05)
            elif "_proj" in name or "embedding" in name:
                parameter.mul_(0.24 / parameter.std())
    return model


@pytest.fixture
def model(shrunk: Any, made: Any) -> Decoder:
    return lively(made(shrunk(llama3_8b), torch.float64))


def test_generating_leaves_each_module_in_its_own_mode_also_after_an_error(model):
    model.train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    generate(model, [PROMPT], max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    model.head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(model, [PROMPT], max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    assert set(before) == {True, False}


CORES = [(flavor, Sdpa.Config()) for flavor in FAMILIES]
CORES += [pytest.param(llama4_scout, Flex.Config(block_size=16), marks=pytest.mark.full)]
CORES += [(llama3_1b, Flex.Config(block_size=16))]


@pytest.mark.parametrize(("flavor", "core"), CORES)
def test_tokens_that_come_one_by_one_have_the_logits_of_a_full_forward(
    flavor: Any, core: Any, shrunk: Any, made: Any
) -> None:
    """Also where several come at once, and every kind of layer."""
    config = shrunk(flavor)
    for block in config.blocks():
        block.attention.core = core
    model = lively(made(config, torch.float64))
    tokens = torch.randint(97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions, documents = torch.arange(LENGTH).expand(2, LENGTH), torch.zeros_like(tokens)
    cache, found = KVCache(model, rows=2, capacity=LENGTH), []
    with torch.no_grad():
        for start, end in [(0, 10), *((place, place + 1) for place in range(10, 25)), (25, LENGTH)]:
            found.append(cache.extend(*(each[:, start:end] for each in (tokens, positions, documents))))
        torch.testing.assert_close(torch.cat(found, 1), model(tokens, positions), rtol=0, atol=1e-9)


@pytest.mark.parametrize("flavor", FAMILIES)
def test_the_likeliest_tokens_are_those_of_transformers(flavor: Any, shrunk: Any, made: Any, reference: Any) -> None:
    model = lively(made(shrunk(flavor), torch.float64, seed=3))
    prompts = torch.tensor([PROMPT, PROMPT[::-1]])
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = reference(model, torch.float64).eval()
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, len(PROMPT) :].tolist()
    found = generate(model, prompts.tolist(), max_new_tokens=LENGTH)
    assert found == expected
    assert len({token for row in found for token in row}) > 5


def test_a_model_that_looks_ahead_generates_as_one_that_does_not(shrunk: Any, made: Any) -> None:
    config = shrunk(deepseek_v3_671b)
    config.mtp = True
    model = lively(made(config, torch.float64))
    assert model.generate([PROMPT], max_new_tokens=15)[0] == one_by_one(model, PROMPT, 15)


def test_prompts_of_different_lengths_are_continued_as_alone(shrunk: Any, made: Any) -> None:
    model = lively(made(shrunk(llama4_scout), torch.float64))
    prompts = [PROMPT, [7], PROMPT * 3, [96, 2]]
    together = model.generate(prompts, max_new_tokens=20)
    assert together == [model.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert together == [one_by_one(model, prompt, 20) for prompt in prompts]


def test_a_row_ends_with_its_stop_token(model: Decoder) -> None:
    prompts = [PROMPT, PROMPT[::-1]]
    rows = model.generate(prompts, max_new_tokens=12)
    stop = [rows[0][3], rows[1][5]]
    expected = [row[: min(row.index(token) for token in stop if token in row) + 1] for row in rows]
    assert model.generate(prompts, max_new_tokens=12, stop=stop) == expected
    calls: list[int] = []
    model.register_forward_hook(lambda *args: calls.append(1))
    model.generate([PROMPT], max_new_tokens=12, stop=[rows[0][3]])
    assert len(calls) == rows[0].index(rows[0][3]) + 1  # nothing is computed after it


def test_drawn_tokens_are_as_frequent_as_their_probabilities(model: Decoder) -> None:
    """Among those that transformers' warpers leave."""
    logits = full_forward(model, PROMPT)[-1:].float()
    warped = transformers.TemperatureLogitsWarper(0.7)(None, logits)
    warped = transformers.TopPLogitsWarper(0.6)(None, warped)
    rows = 4000
    drawn = generate(model, [PROMPT] * rows, max_new_tokens=1, temperature=0.7, top_p=0.6, seed=5)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=97) / rows
    expected = warped.softmax(-1)[0]
    assert torch.equal(counts > 0, expected > 0)
    assert 1 < (expected > 0).sum() < 97
    assert (counts - expected).abs().max() < 4 * (0.25 / rows) ** 0.5


def test_a_seed_draws_the_same_and_another_does_not(model: Decoder) -> None:
    def draw(**choices: Any) -> list[list[int]]:
        return model.generate([PROMPT], max_new_tokens=20, **choices)

    assert draw(temperature=1.0, seed=1) == draw(temperature=1.0, seed=1) != draw(temperature=1.0, seed=2)
    for nearly_none in ({"temperature": 1e-30}, {"temperature": 1.0, "top_p": 1e-9}):
        assert draw(**nearly_none) == draw()


class EverySecond(MaskModifier):
    """Somebody else's mask: queries see keys an even number of places before them."""

    def __init__(self, config: MaskModifier.Config) -> None: ...

    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return (query_position - key_position) % 2 == 0


def test_a_mask_of_somebody_else_is_kept_too(shrunk: Any, made: Any) -> None:
    config = shrunk(llama3_8b)
    config.block.attention.mask_modifiers = [EverySecond.Config()]
    model = lively(made(config, torch.float64))
    assert model.generate([PROMPT], max_new_tokens=20)[0] == one_by_one(model, PROMPT, 20)


def test_generating_leaves_the_model_as_it_was(model: Decoder) -> None:
    before, attributes = full_forward(model, PROMPT), [set(vars(module)) for module in model.modules()]
    model.generate([PROMPT], max_new_tokens=3)
    with pytest.raises(ValueError, match="not finite"):
        model.head.weight.data[5] = torch.nan
        model.generate([PROMPT], max_new_tokens=3)
    assert model.training
    assert [set(vars(module)) for module in model.modules()] == attributes
    model.head.weight.data[5] = 0
    kept = torch.arange(97) != 5
    assert torch.equal(full_forward(model, PROMPT)[:, kept], before[:, kept])


def test_a_cache_that_forgets_positions_is_noticed(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one_by_one(model, PROMPT, 20)
    assert model.generate([PROMPT], max_new_tokens=20)[0] == expected
    extend = KVCache.extend
    monkeypatch.setattr(KVCache, "extend", lambda self, t, p, d: extend(self, t, p * 0 if t.shape[1] == 1 else p, d))
    assert model.generate([PROMPT], max_new_tokens=20)[0] != expected


def test_what_cannot_be_continued_says_why(model: Decoder) -> None:
    for prompts, choices, message in [
        ([], {}, "0 prompts"),
        ([[1], []], {}, r"2 prompts of \[1, 0\] tokens"),
        ([[1, 97]], {}, "token 97 in a prompt.*0 to 96"),
        ([[1]], {"stop": [-1]}, "token -1 in a stop"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([[1] * 1000], {"max_new_tokens": 25}, "1000 tokens and max_new_tokens 25.*to 24 or less"),
        ([[1]], {"temperature": 0.0}, "temperature 0.0.*None for the likeliest"),
        ([[1]], {"temperature": float("nan")}, "temperature nan"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p 0.0"),
        ([[1]], {"top_p": 0.5}, "top_p 0.5 without a temperature"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(prompts, **{"max_new_tokens": 5, **choices})
    with pytest.raises(ValueError, match="meta device"):
        model.config.on_meta().generate([[1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="not finite"):
        model.config.build().generate([[1]], max_new_tokens=1)
    with pytest.raises(ValueError, match="3 tokens in all for a cache of capacity 2"):
        KVCache(model, rows=1, capacity=2).extend(*torch.zeros(3, 1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="without an AttentionCore"):
        KVCache(torch.nn.Linear(2, 2), rows=1, capacity=2)
    assert issubclass(Sdpa, AttentionCore)
