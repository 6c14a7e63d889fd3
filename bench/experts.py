"""Milliseconds of forward and backward of a layer's experts in bf16: `GroupedMM` and `ForLoop`, interleaved.

On a GPU with the widths of public models; without a GPU on the CPU, with those of the debug model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from sizes import sized
from titan_models import init_weights
from titan_models.moe import ForLoop, GroupedMM, Kernel, SwiGLUExperts

PAIRS = sized(15, 1)
SHAPES = {  # dim, hidden_dim, number of experts, experts per token, tokens
    "cuda": {
        "Qwen3 30B-A3B": (2048, 768, 128, 8, 8192),
        "GPT-OSS 20B": (2880, 2880, 32, 4, 8192),
        "DeepSeek-V3, tensor parallel 8": (7168, 256, 256, 8, 4096),
    },
    "cpu": {"qwen3_moe_debug": (256, 256, 8, 2, 2048)},
}
TOY_SHAPES = {device: {"toy": (32, 32, 4, 2, 64)} for device in SHAPES}


def step_of(kernel: Kernel.Config, shape: tuple[int, ...], device: str) -> Callable[[], None]:
    dim, hidden_dim, num_experts, top_k, num_tokens = shape
    experts: SwiGLUExperts = SwiGLUExperts.Config(hidden_dim=hidden_dim, kernel=kernel).build(
        dim=dim, num_experts=num_experts, top_k=top_k
    )
    init_weights(experts, seed=0)
    experts.to(device, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    counts = chosen.flatten().bincount(minlength=num_experts).to(device)
    x = torch.randn(num_tokens * top_k, dim, generator=generator).to(device, torch.bfloat16).requires_grad_()
    gradient = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(experts(x, counts), [x, *experts.parameters()], gradient)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def milliseconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, shape in sized(SHAPES, TOY_SHAPES)[device].items():
        grouped, loop = (step_of(kernel, shape, device) for kernel in (GroupedMM.Config(), ForLoop.Config()))
        for _ in range(3):
            grouped(), loop()
        pairs = [(milliseconds(grouped), milliseconds(loop)) for _ in range(PAIRS)]
        grouped_ms, loop_ms = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(slower / faster for faster, slower in pairs)
        print(f"{name}: grouped {grouped_ms:.2f} ms, loop {loop_ms:.2f} ms, ratio {ratio:.2f} ({device})")


if __name__ == "__main__":
    main()
