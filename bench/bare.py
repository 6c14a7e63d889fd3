"""The baseline: a training loop and the Llama 3 debug model in plain PyTorch, written for speed.

All batches are built in advance. `python bench/bare.py` trains one step and prints its loss, to time the startup.

B batch, T tokens, D width, H heads, K head dim, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sizes import sized
from torch import Tensor, nn

NUM_LAYERS, D, H, K, FEED_FORWARD, V = sized((6, 256, 16, 16, 768, 2048), (1, 32, 2, 16, 64, 2048))
B, T = sized((8, 256), (2, 32))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(D, FEED_FORWARD, bias=False) for _ in range(2))
        self.w2 = nn.Linear(FEED_FORWARD, D, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        h_BTD = self.attention_norm(x_BTD)
        q, k, v = (w(h_BTD).view(-1, T, H, K).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos_TK, sin_TK), rotate(k, cos_TK, sin_TK)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.wo(attended.transpose(1, 2).reshape(-1, T, D))
        h_BTD = self.ffn_norm(x_BTD)
        return x_BTD + self.w2(F.silu(self.w1(h_BTD)) * self.w3(h_BTD))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.head = nn.Linear(D, V, bias=False)
        angles_TK = torch.outer(torch.arange(T), 500_000.0 ** (-torch.arange(0, K, 2) / K)).repeat(1, 2)
        self.register_buffer("cos", angles_TK.cos())
        self.register_buffer("sin", angles_TK.sin())

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x_BTD)).flatten(0, 1).float(), labels_BT.flatten())


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK + torch.cat([-second, first], dim=-1) * sin_TK


class BareRun:
    """A run whose `step()` is one optimizer step; in bf16, forward and backward use a bf16 copy of fp32 weights."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, vocab_size: int = V
    ) -> None:
        """Build the optimizer and the batches; `loss(tokens, labels)` runs the model."""
        self.loss = loss
        self.weights = self.computed = list(model.parameters())
        if dtype != torch.float32:
            self.weights = [nn.Parameter(parameter.detach().clone()) for parameter in self.computed]
            model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        tokens = torch.randint(vocab_size, (16, B, T + 1))
        self.batches = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]
        self.num_steps = 0

    def step(self) -> float:
        loss = self.loss(*self.batches[self.num_steps % len(self.batches)])
        loss.backward()
        if self.weights is not self.computed:
            for weight, computed in zip(self.weights, self.computed, strict=True):
                weight.grad, computed.grad = computed.grad.float(), None
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.weights is not self.computed:
            with torch.no_grad():
                torch._foreach_copy_(self.computed, self.weights)
        self.num_steps += 1
        return loss.item()


def llama_run(dtype: torch.dtype) -> BareRun:
    torch.manual_seed(0)
    model = Llama()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    return BareRun(model, model, dtype)


if __name__ == "__main__":
    print(llama_run(torch.float32).step())
