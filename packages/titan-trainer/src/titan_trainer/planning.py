"""`--plan`, the dry run of a recipe: memory, FLOPs, communication on any number of ranks, in one process without data.

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
class PlanArguments:
    """Flags of the dry run, and in `rest` those of the recipe."""

    world_size: int
    device_memory: str | None
    json: bool
    rest: list[str]


def print_plan(recipe: Callable[[], Trainer.Config], argv: Sequence[str]) -> int:
    """Print the dry run of `recipe` with the flags `argv`; return the exit code: 0, 1 if it does not fit, 2 on error.

    Under torchrun only rank 0 prints.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    try:
        arguments = parse_plan_arguments(argv)
        result = plan_run(cli(recipe, arguments.rest), arguments.world_size, arguments.device_memory)
    except ValueError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        return 2
    print(result.to_json() if arguments.json else result)
    return 1 if result.fits is False else 0


def parse_plan_arguments(argv: Sequence[str]) -> PlanArguments:
    """Separate the flags of the dry run from those of the recipe. Raises ConfigError for invalid values."""
    values: dict[str, str | None] = {}
    rest: list[str] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        name, has_value, value = argument.partition("=")
        name = name.replace("_", "-")
        if name in ("--plan", "--json"):
            values[name] = ""
        elif name in ("--world-size", "--device-memory"):
            values[name] = value if has_value else remaining.pop(0) if remaining else None
        else:
            rest.append(argument)
    size = values.get("--world-size")
    if size is None or not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"--world-size must be a number of ranks, at least 1, with --plan, got {size or 'none'}.")
    if "--device-memory" in values and values["--device-memory"] is None:
        raise ConfigError("--device-memory must be the memory of one device, such as 80GiB, got none.")
    return PlanArguments(int(size), values.get("--device-memory"), "--json" in values, rest)


def plan_run(config: Trainer.Config, world_size: int, device_memory: str | None = None) -> Plan:
    """Return the memory, FLOPs and communication of a run on `world_size` ranks.

    With `device_memory`, such as "80GiB", the plan also tells whether the run fits. Raises ConfigError if the run is
    invalid.
    """
    training = config.training
    dp_size = ParallelDims.count_data_ranks(config.parallelism, world_size)
    loader: LoaderConfig = config.dataloader  # type: ignore[assignment]  # a recipe sets one
    batch, cursor_delta = loader.batch_spec(
        seq_len=training.seq_len,
        global_batch_size=training.global_batch_size,
        local_batch_size=training.local_batch_size,
    )

    def trainer_collectives(dims: ParallelDims) -> None:
        """Send what `Trainer.sum_over_data_ranks` (valid targets, tokens, cursor delta) and `Trainer.agree` send."""
        if dims.dp_size > 1:
            dist.all_reduce(torch.zeros(2 + cursor_delta.numel(), dtype=torch.int64), group=dims.data_group)
        if dims.world_size > 1:
            dist.all_reduce(torch.tensor(0))

    model: Any = config.model
    flops = model.flops_per_token(training.seq_len)
    return plan(
        lambda: model_on_meta(config)[0],
        roles=model_on_meta(config)[1],
        batch=batch,
        num_batches=training.num_batches(dp_size),
        loss=config.loss.build(),
        optimizer=lambda parameters: config.optimizer.build(parameters=parameters).optimizer,
        world_size=world_size,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        mixed_precision=training.mixed_precision(),
        extra_transforms=[transform.build() for transform in config.transforms],
        also=trainer_collectives,
        flops_per_token=(flops.full, flops.causal),
        device_memory=device_memory,
    )
