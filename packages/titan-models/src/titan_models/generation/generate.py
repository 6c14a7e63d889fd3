"""Text generation from token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from titan_models.generation.kv_cache import KVCache
from titan_models.model import Model
from titan_models.training.eval_mode import in_eval_mode

_PADDING = 1
"""The document id of the left padding of shorter prompts; the prompts have document id 0."""


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Return the continuation of each prompt: `max_new_tokens` token ids, or fewer that end with a token of `stop`.

    With `temperature` None decoding is greedy. Otherwise each token is sampled from the softmax of logits /
    `temperature`, among the most likely tokens whose probabilities add up to `top_p`; the same `seed` gives the same
    tokens. Prompts may differ in length and do not affect each other. The model is in eval mode during generation;
    afterwards the mode of each module is restored.

    Raises ValueError for invalid arguments, a model on the meta device, and logits that are not finite.
    """
    _check_prompts(prompts, model.config.vocab_size, stop)
    _check_length(prompts, max_new_tokens, model.config.max_seq_len)
    _check_sampling(temperature, top_p)
    device = _device_of(model)
    tokens, positions, documents = (tensor.to(device) for tensor in _left_pad(prompts))
    cache = KVCache(model, batch_size=len(prompts), capacity=tokens.shape[1] + max_new_tokens - 1)
    generator = torch.Generator(device).manual_seed(seed)
    stops = torch.tensor([*stop], dtype=torch.int64, device=device)
    generated = []
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with in_eval_mode(model):
        for _ in range(max_new_tokens):
            logits = cache.extend(tokens, positions, documents)[:, -1]
            tokens = _choose(logits, temperature, top_p, generator).unsqueeze(1)
            positions, documents = positions[:, -1:] + 1, documents[:, -1:]
            generated.append(tokens)
            finished |= torch.isin(tokens.squeeze(1), stops)
            if finished.all():
                break
    return [_truncate(ids, stop) for ids in torch.cat(generated, 1).tolist()]


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, positions and document ids `[B, T]` of left-padded prompts; padding is a separate document."""
    length = max(map(len, prompts))
    indices = torch.arange(length)
    starts = torch.tensor([[length - len(prompt)] for prompt in prompts])
    is_padding = indices < starts
    tokens = torch.tensor([[0] * (length - len(prompt)) + [*prompt] for prompt in prompts])
    return tokens, torch.where(is_padding, indices, indices - starts), is_padding * _PADDING


def _choose(logits_BV: Tensor, temperature: float | None, top_p: float, generator: torch.Generator) -> Tensor:
    """Return the next token of each sequence, int64 `[B]`."""
    if not logits_BV.isfinite().all():
        raise ValueError(
            "Logits must be finite to choose a token, got NaN or infinity. Check that the weights are initialized or "
            "loaded, and that the training run did not diverge."
        )
    if temperature is None:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # so that a low temperature does not overflow
    sorted_BV, order_BV = (logits_BV / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    probability_before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sampled_B1 = torch.multinomial(sorted_BV.masked_fill(probability_before_BV >= top_p, 0), 1, generator=generator)
    return order_BV.gather(1, sampled_B1).squeeze(1)


def _truncate(tokens: list[int], stop: Collection[int]) -> list[int]:
    """Return the tokens up to the first stop token, that one included."""
    ends = [index + 1 for index, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


def _device_of(model: nn.Module) -> torch.device:
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "The model must have weights to generate, got one on the meta device. Call model.to_empty(device=...) and "
            "load the weights."
        )
    return device


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, stop: Collection[int]) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            "There must be at least one prompt, each of at least one token (such as the BOS token), got prompts of "
            f"{[len(prompt) for prompt in prompts]} tokens."
        )
    for ids, argument in [*((prompt, "prompts") for prompt in prompts), (stop, "stop")]:
        if outside := [token for token in ids if not 0 <= token < vocab_size]:
            raise ValueError(
                f"Token ids must be 0 to {vocab_size - 1}, got {outside[0]} in {argument}. Use the tokenizer that the "
                "model was trained with."
            )


def _check_length(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> None:
    longest = max(map(len, prompts))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if longest + max_new_tokens > max_seq_len:
        raise ValueError(
            f"Prompt length + max_new_tokens must be at most max_seq_len ({max_seq_len}), got {longest} + "
            f"{max_new_tokens}."
        )


def _check_sampling(temperature: float | None, top_p: float) -> None:
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}. For greedy decoding, use None.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be > 0 and at most 1, got {top_p}.")
    if temperature is None and top_p != 1:
        raise ValueError(f"top_p must be 1 without a temperature (greedy decoding), got {top_p}. Set temperature.")
