"""A model continues token ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from titan_models.generation.kv_cache import KVCache
from titan_models.model import Model
from titan_models.training.eval_mode import in_eval_mode

_PADDING = 1
"""The document of what stands before shorter prompts; prompts are document 0."""


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
    """What `model` continues each prompt with: `max_new_tokens` ids, or fewer, the last of them from `stop`.

    A `temperature` divides the logits before a token is drawn (None: the likeliest is taken), among the likeliest whose
    probabilities add up to `top_p`. The same `seed` draws the same. Prompts may have different lengths: each is
    continued as it would be alone. The model is in eval mode meanwhile; each module's own mode is restored.

    Raises ValueError for what cannot be continued so.
    """
    _check_prompts(prompts, model.config.vocab_size, stop)
    _check_length(prompts, max_new_tokens, model.config.max_seq_len)
    _check_choice(temperature, top_p)
    device = _device_of(model)
    tokens, positions, documents = (each.to(device) for each in _left_padded(prompts))
    cache = KVCache(model, rows=len(prompts), capacity=tokens.shape[1] + max_new_tokens - 1)
    generator = torch.Generator(device).manual_seed(seed)
    stops = torch.tensor([*stop], dtype=torch.int64, device=device)
    chosen = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with in_eval_mode(model):
        for _ in range(max_new_tokens):
            logits = cache.extend(tokens, positions, documents)[:, -1]
            tokens = _choose(logits, temperature, top_p, generator).unsqueeze(1)
            positions, documents = positions[:, -1:] + 1, documents[:, -1:]
            chosen.append(tokens)
            ended |= torch.isin(tokens.squeeze(1), stops)
            if ended.all():
                break
    return [_up_to(stop, row) for row in torch.cat(chosen, 1).tolist()]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and documents `[B, T]`: prompts end together, and padding is a document of its own."""
    length = max(map(len, prompts))
    places = torch.arange(length)
    starts = torch.tensor([[length - len(prompt)] for prompt in prompts])
    is_padding = places < starts
    tokens = torch.tensor([[0] * (length - len(prompt)) + [*prompt] for prompt in prompts])
    return tokens, torch.where(is_padding, places, places - starts), is_padding * _PADDING


def _choose(logits_BV: Tensor, temperature: float | None, top_p: float, generator: torch.Generator) -> Tensor:
    """A token for each row, int64 `[B]`."""
    if not logits_BV.isfinite().all():
        raise ValueError(
            "Got logits that are not finite. A token is chosen by them. Initialize the model or load its weights, and "
            "look at the run if they come from one."
        )
    if temperature is None:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)  # so that a low temperature makes no infinity
    sorted_BV, order_BV = (logits_BV / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    likelier_BV = sorted_BV.cumsum(-1) - sorted_BV
    drawn_B1 = torch.multinomial(sorted_BV.masked_fill(likelier_BV >= top_p, 0), 1, generator=generator)
    return order_BV.gather(1, drawn_B1).squeeze(1)


def _up_to(stop: Collection[int], tokens: list[int]) -> list[int]:
    ends = [place + 1 for place, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0]] if ends else tokens


def _device_of(model: nn.Module) -> torch.device:
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError(
            "Got a model on the meta device. It needs weights to generate. Call model.to_empty(device=...), and load "
            "them."
        )
    return device


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, stop: Collection[int]) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            f"Got {len(prompts)} prompts of {[len(prompt) for prompt in prompts]} tokens. Each is continued, so it has "
            "a first one. Give one or more prompts of one token or more, such as that which begins a document."
        )
    for ids, what in [*((prompt, "prompt") for prompt in prompts), (stop, "stop")]:
        if outside := [token for token in ids if not 0 <= token < vocab_size]:
            raise ValueError(
                f"Got the token {outside[0]} in a {what}. This model's are 0 to {vocab_size - 1}. Take the tokenizer "
                "that it was trained with."
            )


def _check_length(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> None:
    longest = max(map(len, prompts))
    if max_new_tokens < 1:
        raise ValueError(f"Got max_new_tokens {max_new_tokens}. There is something to generate. Set it to 1 or more.")
    if longest + max_new_tokens > max_seq_len:
        raise ValueError(
            f"Got a prompt of {longest} tokens and max_new_tokens {max_new_tokens}. The model is meant for "
            f"{max_seq_len} in all. Shorten the prompt, or set max_new_tokens to {max_seq_len - longest} or less."
        )


def _check_choice(temperature: float | None, top_p: float) -> None:
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(
            f"Got temperature {temperature}. Logits are divided by it. Set it above 0, such as 0.8, or to None for the "
            "likeliest token."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"Got top_p {top_p}. It is a probability. Set it above 0, up to 1 for all tokens.")
    if temperature is None and top_p != 1:
        raise ValueError(
            f"Got top_p {top_p} without a temperature. It is about drawing, and the likeliest token is taken. Set a "
            "temperature, such as 1.0, or leave top_p out."
        )
