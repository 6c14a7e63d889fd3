"""`--plan`: what a run would be on some number of ranks, without reading anything, and without those ranks.

python recipes/llama3_405b.py --plan --world-size 512 [--device-memory 80GiB] [--json] [any flag of the recipe]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from titan_config import ConfigError, cli
from titan_parallel import ParallelDims, Plan, plan

from titan_trainer.protocols import LoaderConfig
from titan_trainer.trainer import Trainer, model_on_meta


@dataclass
class Arguments:
    """The words of a command line that are the plan's, and the `rest`, which are the recipe's."""

    world_size: int
    device_memory: str | None
    json: bool
    rest: list[str]


def print_plan(recipe: Callable[[], Trainer.Config], words: Sequence[str]) -> int:
    """Print the plan of `recipe` as changed by `words`; return 0, 1 if it does not fit, 2 if there is none."""
    if os.environ.get("RANK", "0") != "0":
        return 0  # of the processes that torchrun starts with the same words, one speaks
    try:
        arguments = read_words(words)
        made = plan_of(cli(recipe, arguments.rest), arguments.world_size, arguments.device_memory)
    except ValueError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        return 2
    print(made.to_json() if arguments.json else made)
    return 1 if made.fits is False else 0


def read_words(words: Sequence[str]) -> Arguments:
    """Take the plan's own flags out of a command line. Raises ConfigError for those without a sound value."""
    values: dict[str, str | None] = {}
    rest: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        name, has_value, value = word.partition("=")
        name = name.replace("_", "-")
        if name in ("--plan", "--json"):
            values[name] = ""
        elif name in ("--world-size", "--device-memory"):
            values[name] = value if has_value else remaining.pop(0) if remaining else None
        else:
            rest.append(word)
    size = values.get("--world-size")
    if size is None or not size.isdecimal() or int(size) < 1:
        got = f"--world-size {size}" if size else "no --world-size"
        raise ConfigError(
            f"Got {got} for --plan. A plan is for a number of ranks, 1 or more. Add --world-size 512, say."
        )
    if "--device-memory" in values and values["--device-memory"] is None:
        raise ConfigError("Got --device-memory without a size. It is that of one device. Write --device-memory 80GiB.")
    return Arguments(int(size), values.get("--device-memory"), "--json" in values, rest)


def plan_of(config: Trainer.Config, world_size: int, device_memory: str | None = None) -> Plan:
    """The plan of a run on `world_size` ranks. Raises ConfigError where it could not run."""
    training = config.training
    dp_size = ParallelDims.count_data_ranks(config.parallelism, world_size)
    loader: LoaderConfig = config.dataloader  # type: ignore[assignment]  # the recipe's promise
    batch, cursor_delta = loader.batch_spec(
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        local_batch_size=training.local_batch_size,
    )

    def sums_of_the_loop(dims: ParallelDims) -> None:
        """Those of `sum_over_data_ranks` (valid targets, tokens, cursor_delta) and of `agree`."""
        if dims.dp_size > 1:
            dist.all_reduce(torch.zeros(2 + cursor_delta.numel(), dtype=torch.int64), group=dims.data_group)
        if dims.world_size > 1:
            dist.all_reduce(torch.tensor(0))

    model: Any = config.model
    flops = model.flops_per_token(training.seq_len)
    return plan(
        lambda: model_on_meta(config)[0],
        batch=batch,
        num_batches=training.num_batches(dp_size),
        loss=config.loss.build(),
        optimizer=lambda parameters: config.optimizer.build(parameters=parameters).optimizer,
        world_size=world_size,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        mixed_precision=training.mixed_precision(),
        also=sums_of_the_loop,
        flops_per_token=(flops.full, flops.causal),
        device_memory=device_memory,
    )
