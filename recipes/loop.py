# /// script
# requires-python = ">=3.11"
# dependencies = ["titan-parallel==0.1.*", "titan-data==0.1.*", "titan-models==0.1.*", "torch==2.13.0"]
# ///
"""Train llama3_debug with a custom training loop, titan-parallel and titan-data.

torchrun --nproc-per-node 2 recipes/loop.py
"""

from pathlib import Path

import torch
import torch.distributed as dist
from titan_data import JsonlSource, TiktokenTokenizer, TokenLoader
from titan_models.llama3 import llama3_debug
from titan_parallel import ParallelDims, cross_entropy, init_distributed, parallelize, per_token

ASSETS = Path(__file__).parent / "assets"
STEPS = 40


@per_token
def next_token_loss(head, hidden, targets):
    """Return the loss sum over valid labels, and their number."""
    labels = targets["labels"].flatten()
    return cross_entropy(head(hidden.flatten(0, -2)), labels), (labels != -100).sum()


def train(steps: int = STEPS) -> list[float]:
    """Train and return the loss of each step."""
    device = init_distributed()
    dims = ParallelDims.Config().build(world_size=dist.get_world_size(), device_type=device.type)

    tokenizer = TiktokenTokenizer.Config(
        path=ASSETS / "austen.tiktoken", special_tokens={"<|end_of_text|>": 2047}, eos="<|end_of_text|>"
    ).build()
    loader = TokenLoader.Config(source=JsonlSource.Config(path=ASSETS / "austen/train.jsonl"), add_eos=True).build(
        tokenizer=tokenizer, seq_len=256, global_batch_size=16, local_batch_size=8, seed=0
    )

    with torch.device("meta"):
        model = llama3_debug().build()
    parallel = parallelize(model, model.roles(), dims)
    parallel.to_empty(device)
    model.init_weights(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, 1 - (step - 5) / (STEPS - 5))
    )

    losses = []
    for step in range(steps):
        batches = loader.next_batches(dims.dp_rank, dims.dp_size)
        count = sum((batch.targets["labels"] != -100).sum() for batch in batches)
        cursor_delta = loader.cursor_delta()
        for total in (count, cursor_delta):
            dist.all_reduce(total, group=dims.data_group)
        loss_sum = parallel.forward_backward(batches, next_token_loss, denominator=count)
        grad_norm = parallel.clip_grad_norm_(1.0)
        optimizer.step()
        schedule.step()
        loader.commit(cursor_delta)
        losses.append(float(loss_sum / count))
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step + 1}  loss {losses[-1]:.4f}  grad norm {grad_norm:.3f}", flush=True)
    return losses


if __name__ == "__main__":
    train()
