"""Tokens a second of recipes/qwen3_moe_debug.py beside a loop in bare PyTorch over the same module, taking turns.

Rows of 256 tokens, one process, fp32 and bf16, experts balanced by a bias. Everything the trainer does in a step is
counted: drawing the data, metrics, the checks, the counts of experts. The bare loop has its batches made beforehand.
"""

from __future__ import annotations

import multiprocessing
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from titan_models.moe import BalancingBias
from torch.nn import functional

RECIPES = Path(__file__).parent.parent / "recipes"
B, T = 8, 256
BLOCKS, STEPS_A_BLOCK, WARMUP_STEPS = 12, 3, 3


class BareRun:
    """AdamW on the trainer's model, without the trainer and without counts."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.model = config.build()
        self.model.init_weights(0)
        self.weights = self.computed = [*self.model.parameters()]
        if dtype != torch.float32:
            self.weights = [torch.nn.Parameter(parameter.detach().clone()) for parameter in self.computed]
            self.model.to(dtype)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.batches = torch.randint(config.vocab_size, (16, B, T + 1))
        self.positions = torch.arange(T).expand(B, T)
        self.num_steps = 0

    def step(self) -> float:
        row = self.batches[self.num_steps % len(self.batches)]
        logits = self.model(row[:, :-1], self.positions)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), row[:, 1:].flatten())
        loss.backward()
        if self.weights is not self.computed:
            for weight, computed in zip(self.weights, self.computed, strict=True):
                weight.grad, computed.grad = computed.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.weights is not self.computed:
            with torch.no_grad():
                torch._foreach_copy_(self.computed, self.weights)
        self.num_steps += 1
        return loss.item()


def config_of(dtype: str, dump_folder: str) -> Any:
    """The recipe with what the bare loop has: the same shapes, nothing but training."""
    sys.path.append(str(RECIPES))  # where Python looks when a recipe is run as a script
    config = runpy.run_path(str(RECIPES / "qwen3_moe_debug.py"))["qwen3_moe_debug"]()
    config.model.block.feed_forward.router.balancing = BalancingBias.Config()
    training = config.training
    training.seq_len, training.local_batch_size, training.global_batch_size = T, B, B
    training.mixed_precision_param = dtype
    training.steps = WARMUP_STEPS + BLOCKS * STEPS_A_BLOCK
    config.activation_checkpoint = config.compile = config.validator = config.checkpoint = None
    config.dump_folder = Path(dump_folder)
    return config


def compare(dtype: str) -> None:
    """Train with the trainer, and after each block of its steps as many of the bare loop's."""
    times: list[tuple[float, float]] = []
    processor_times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(dtype, folder)
        bare_run = BareRun(config.model, getattr(torch, dtype))
        bare_run.step()
        trainer = config.build()
        after_step, started = trainer.after_step, now()

        def after_step_and_bare_block(result: Any) -> None:
            nonlocal started
            after_step(result)
            done = trainer.step - WARMUP_STEPS
            if done > 0 and done % STEPS_A_BLOCK == 0:
                middle = now()
                for _ in range(STEPS_A_BLOCK):
                    bare_run.step()
                ended = now()
                times.append((middle[0] - started[0], ended[0] - middle[0]))
                processor_times.append((middle[1] - started[1], ended[1] - middle[1]))
            if done >= 0 and done % STEPS_A_BLOCK == 0:
                started = now()

        trainer.after_step = after_step_and_bare_block
        trainer.train()
    report(dtype, times)
    report(f"{dtype}, of processor time", processor_times)


def now() -> tuple[float, float]:
    """Seconds of the clock, and of the processor in all threads."""
    return time.perf_counter(), time.process_time()


def report(what: str, times: list[tuple[float, float]]) -> None:
    tokens = STEPS_A_BLOCK * B * T
    ratios = sorted(their_seconds / our_seconds for our_seconds, their_seconds in times)
    ours, theirs = (tokens / statistics.median(seconds) for seconds in zip(*times, strict=True))
    print(f"{what}: titan {ours:.0f} tokens/s, bare loop {theirs:.0f}", end=", ")
    print(
        f"ratio {statistics.median(ratios):.3f} (limit 0.9; {len(ratios)} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    for dtype in ("float32", "bfloat16"):
        process = multiprocessing.get_context("spawn").Process(target=compare, args=(dtype,))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"The comparison in {dtype} ended with code {process.exitcode}.")
