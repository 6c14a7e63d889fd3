"""Train torchtitan's Llama 3 debug model on a CPU on given batches, and print losses and gradient norms as JSON.

It runs in a separate environment (torch, and requirements.txt of this folder installed with `--no-deps`). Model,
initial weights, loss and schedule are torchtitan's. Flex attention, which is slow on a CPU, is replaced by torch's
scaled dot product attention with the same mask; the optimizer is torch's AdamW with torchtitan's settings.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.models.common import attention
from torchtitan.models.llama3 import llama3_configs


def dense(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, attention_masks: Tensor, **_: object) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_masks, enable_gqa=True).transpose(1, 2)


def mask_of(documents: Tensor) -> Tensor:
    """Return `[B, 1, T, T]`: True where a token attends to itself and earlier tokens of its document."""
    same = documents[:, :, None] == documents[:, None, :]
    return (same & torch.ones(same.shape[-2:], dtype=torch.bool).tril())[:, None]


def train(batches: list[dict[str, Tensor]], seed: int, lr: float, warmup: int) -> dict[str, list[float]]:
    """Train one step on each of `batches`, with tokens, positions, document_ids and labels `[B, T]`; return curves."""
    attention.FlexAttention.forward = dense
    model = llama3_configs["debugmodel"](attn_backend="flex").build()
    torch.manual_seed(seed)
    model.init_states()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    decay = len(batches) - warmup
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warmup if step < warmup else 1 - max(step - warmup, 0) / decay
    )
    curve: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for batch in batches:
        logits = model(batch["tokens"], positions=batch["positions"], attention_masks=mask_of(batch["document_ids"]))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
        loss.backward()
        curve["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        curve["loss"].append(float(loss.detach()))
    return curve


if __name__ == "__main__":
    file, seed, lr, warmup = sys.argv[1:]
    print(json.dumps(train(torch.load(file), int(seed), float(lr), int(warmup))))
