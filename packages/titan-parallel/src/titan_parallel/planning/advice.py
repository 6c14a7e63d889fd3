"""Changes that make a run fit, found by further dry runs; and warnings about wasteful settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from titan_parallel.memory.activation_checkpoint import FullActivationCheckpoint, SelectiveActivationCheckpoint
from titan_parallel.planning.report import Plan, Suggestion
from titan_parallel.planning.simulate import BatchSpec, SimulatedStep
from titan_parallel.planning.sizes import show_bytes

ENOUGH = 2
"""Number of fitting suggestions after which the search ends: the cheapest, and an alternative."""
MAX_BUBBLE = 0.2


Change = Callable[[SimulatedStep, int], tuple[str, str, SimulatedStep] | None]
"""(step, ranks_per_node) -> (setting, new value, changed step), or None where the change does not apply."""


def suggest_changes(
    step: SimulatedStep, ranks_per_node: int, peak: int, limit: int, peak_of: Callable[[SimulatedStep], int]
) -> list[Suggestion]:
    """Return changes that lower the `peak`, the cheapest first, until `ENOUGH` of them fit `limit` (both in bytes).

    Each suggestion includes the changes of those before it.
    """
    suggestions: list[Suggestion] = []
    changes: dict[str, str] = {}
    for change in CHANGES:
        while (proposal := change(step, ranks_per_node)) is not None:
            name, value, changed = proposal
            try:
                changed_peak = peak_of(changed)
            except ValueError:  # heads, sequences or ranks that the degrees do not divide
                break
            if changed_peak >= peak:
                break
            step, peak, changes[name] = changed, changed_peak, value
            suggestions.append(Suggestion(", ".join(f"{n} {v}" for n, v in changes.items()), peak, peak <= limit))
            if sum(suggestion.fits for suggestion in suggestions) == ENOUGH:
                return suggestions
    return suggestions


def _reduce_always(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    if step.parallelism.fsdp_reduce_gradients == "always":
        return None
    changed = copy.deepcopy(step.parallelism)
    changed.fsdp_reduce_gradients = "always"
    return "fsdp_reduce_gradients", "always", step.changed(parallelism=changed)


def _selective_checkpointing(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    if step.activation_checkpoint is not None:
        return None
    return (
        "activation_checkpoint",
        "SelectiveActivationCheckpoint",
        step.changed(activation_checkpoint=SelectiveActivationCheckpoint.Config()),
    )


def _full_checkpointing(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    if isinstance(step.activation_checkpoint, FullActivationCheckpoint.Config):
        return None
    return (
        "activation_checkpoint",
        "FullActivationCheckpoint",
        step.changed(activation_checkpoint=FullActivationCheckpoint.Config()),
    )


def _halve_micro_batches(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    size, remainder = divmod(step.batch.batch_size, 2)
    if remainder:
        return None
    changed = step.changed(batch=BatchSpec.of(step.batch, size), num_batches=step.num_batches * 2)
    return "local_batch_size", str(size), changed


def _remove_replicas(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    if step.parallelism.data_parallel_replicate_degree == 1:
        return None
    return "data_parallel_replicate_degree", "1", step.with_degrees(data_parallel_replicate_degree=1)


def _double_tensor_parallel(step: SimulatedStep, ranks_per_node: int) -> tuple[str, str, SimulatedStep] | None:
    """Halve the number of data ranks; each then has twice as many micro-batches."""
    degree = step.parallelism.tensor_parallel_degree * 2
    if degree > min(ranks_per_node, step.world_size):
        return None
    changed = step.with_degrees(tensor_parallel_degree=degree).changed(num_batches=step.num_batches * 2)
    return "tensor_parallel_degree", str(degree), changed


def _double_ranks(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    """Double the number of data ranks; each then has half as many micro-batches."""
    half, remainder = divmod(step.num_batches, 2)
    if remainder:
        return None
    changed = step.with_degrees().changed(world_size=step.world_size * 2, num_batches=half)
    return "world_size", str(changed.world_size), changed


CHANGES: tuple[Change, ...] = (
    _reduce_always,
    _selective_checkpointing,
    _full_checkpointing,
    _halve_micro_batches,
    _remove_replicas,
    _double_tensor_parallel,
    _double_ranks,
)


def warnings_of(plan: Plan, step: SimulatedStep) -> list[str]:
    """Return warnings about settings that are probably not intended."""
    return [line for rule in (_tensor_over_nodes, _replicated, _bubble, _small_batches) for line in rule(plan, step)]


def _tensor_over_nodes(plan: Plan, step: SimulatedStep) -> Iterator[str]:
    for axis in plan.mesh:
        if axis.name == "tp" and axis.nodes > 1:
            yield (
                f"Tensor parallel spans {axis.nodes} nodes: every block waits for several collectives between nodes. "
                f"Set tensor_parallel_degree to a divisor of {plan.ranks_per_node}."
            )


def _replicated(plan: Plan, step: SimulatedStep) -> Iterator[str]:
    replicas = step.parallelism.data_parallel_replicate_degree
    stored = max(stage.parameters + stage.gradients + stage.optimizer for stage in plan.stages)
    if replicas > 1 and stored > plan.peak / 2:
        yield (
            f"Weights, gradients and optimizer state are replicated {replicas} times and take {show_bytes(stored)} of "
            "each rank's peak. Set data_parallel_replicate_degree to 1 to shard them to "
            f"{show_bytes(stored / replicas)}."
        )


def _bubble(plan: Plan, step: SimulatedStep) -> Iterator[str]:
    if plan.bubble is not None and plan.bubble > MAX_BUBBLE:
        yield (
            f"The pipeline bubble is {plan.bubble:.0%} of a step. Use more micro-batches, an interleaved schedule, or "
            "fewer stages."
        )


def _small_batches(plan: Plan, step: SimulatedStep) -> Iterator[str]:
    has_room = plan.device_memory is not None and plan.peak < plan.device_memory / 2
    if has_room and plan.num_batches > 1 and step.parallelism.pipeline_parallel_degree == 1:
        yield (
            f"{plan.num_batches} micro-batches of local_batch_size {plan.local_batch_size} leave half of the memory "
            "free, and each gathers all weights again. Use fewer and larger micro-batches."
        )
    if has_room and isinstance(step.activation_checkpoint, FullActivationCheckpoint.Config):
        yield (
            "Full activation checkpointing leaves half of the memory free. Use SelectiveActivationCheckpoint, which "
            "recomputes less."
        )
