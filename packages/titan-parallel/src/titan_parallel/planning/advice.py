"""What would make a run fit, found by planning it; and what looks wasteful."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from titan_parallel.memory.activation_checkpoint import FullActivationCheckpoint, SelectiveActivationCheckpoint
from titan_parallel.planning.report import Plan, Remedy
from titan_parallel.planning.simulate import Rows, SimulatedStep
from titan_parallel.planning.sizes import show_bytes

ENOUGH = 2  # remedies that fit: the cheapest, and a choice
MAX_BUBBLE = 0.2


Rung = Callable[[SimulatedStep, int], tuple[str, str, SimulatedStep] | None]
"""A change of a step, on nodes of so many ranks: (what, to what, the changed step), or None where it has been done."""


def remedies_of(
    step: SimulatedStep, ranks_per_node: int, peak: int, limit: int, peak_of: Callable[[SimulatedStep], int]
) -> list[Remedy]:
    """Changes that lower the `peak`, each on top of those before it, the cheapest first, until enough fit `limit`."""
    remedies: list[Remedy] = []
    changes: dict[str, str] = {}
    for rung in RUNGS:
        while (proposal := rung(step, ranks_per_node)) is not None:
            name, value, changed = proposal
            try:
                changed_peak = peak_of(changed)
            except ValueError:  # heads, rows or ranks that do not divide
                break
            if changed_peak >= peak:
                break
            step, peak, changes[name] = changed, changed_peak, value
            remedies.append(Remedy(", ".join(f"{n} {v}" for n, v in changes.items()), peak, peak <= limit))
            if sum(remedy.fits for remedy in remedies) == ENOUGH:
                return remedies
    return remedies


def _reduce_always(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    if step.parallelism.fsdp_reduce_gradients == "always":
        return None
    changed = copy.deepcopy(step.parallelism)
    changed.fsdp_reduce_gradients = "always"
    return "fsdp_reduce_gradients", "always", step.changed(parallelism=changed)


def _recompute_some(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    if step.activation_checkpoint is not None:
        return None
    return (
        "activation_checkpoint",
        "SelectiveActivationCheckpoint",
        step.changed(activation_checkpoint=SelectiveActivationCheckpoint.Config()),
    )


def _recompute_all(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    if isinstance(step.activation_checkpoint, FullActivationCheckpoint.Config):
        return None
    return (
        "activation_checkpoint",
        "FullActivationCheckpoint",
        step.changed(activation_checkpoint=FullActivationCheckpoint.Config()),
    )


def _halve_rows(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    rows, odd = divmod(step.batch.num_rows, 2)
    if odd:
        return None
    changed = step.changed(batch=Rows.of(step.batch, rows), num_batches=step.num_batches * 2)
    return "rows of a micro-batch", str(rows), changed


def _drop_replicas(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    if step.parallelism.data_parallel_replicate_degree == 1:
        return None
    return "data_parallel_replicate_degree", "1", step.with_degrees(data_parallel_replicate_degree=1)


def _double_tensor(step: SimulatedStep, ranks_per_node: int) -> tuple[str, str, SimulatedStep] | None:
    """Half as many data ranks, each with twice the micro-batches."""
    degree = step.parallelism.tensor_parallel_degree * 2
    if degree > min(ranks_per_node, step.world_size):
        return None
    changed = step.with_degrees(tensor_parallel_degree=degree).changed(num_batches=step.num_batches * 2)
    return "tensor_parallel_degree", str(degree), changed


def _double_ranks(step: SimulatedStep, _: int) -> tuple[str, str, SimulatedStep] | None:
    """Twice as many data ranks, each with half of the micro-batches."""
    half, odd = divmod(step.num_batches, 2)
    if odd:
        return None
    changed = step.with_degrees().changed(world_size=step.world_size * 2, num_batches=half)
    return "ranks", str(changed.world_size), changed


RUNGS: tuple[Rung, ...] = (
    _reduce_always,
    _recompute_some,
    _recompute_all,
    _halve_rows,
    _drop_replicas,
    _double_tensor,
    _double_ranks,
)


def wasteful(plan: Plan, step: SimulatedStep) -> list[str]:
    """A few things that are seldom meant."""
    return [line for rule in (_tensor_over_nodes, _replicated, _bubble, _small_batches) for line in rule(plan, step)]


def _tensor_over_nodes(plan: Plan, step: SimulatedStep) -> Iterator[str]:
    for axis in plan.mesh:
        if axis.name == "tp" and axis.nodes > 1:
            yield (
                f"Tensor parallel over {axis.nodes} nodes: it exchanges several times a block, and waits for it. "
                f"Set tensor_parallel_degree to a divisor of {plan.ranks_per_node}."
            )


def _replicated(plan: Plan, step: SimulatedStep) -> Iterator[str]:
    replicas = step.parallelism.data_parallel_replicate_degree
    stored = max(stage.parameters + stage.gradients + stage.optimizer for stage in plan.stages)
    if replicas > 1 and stored > plan.peak / 2:
        yield (
            f"{replicas} replicas, each of which holds all weights, gradients and optimizer state: "
            f"{show_bytes(stored)} of a rank's peak. Sharded they are {show_bytes(stored / replicas)}: set "
            "data_parallel_replicate_degree to 1."
        )


def _bubble(plan: Plan, step: SimulatedStep) -> Iterator[str]:
    if plan.bubble is not None and plan.bubble > MAX_BUBBLE:
        yield (
            f"A pipeline bubble of {plan.bubble:.0%}: stages wait for each other. Take more micro-batches, an "
            "interleaved schedule, or fewer stages."
        )


def _small_batches(plan: Plan, step: SimulatedStep) -> Iterator[str]:
    room = plan.device_memory is not None and plan.peak < plan.device_memory / 2
    if room and plan.num_batches > 1 and step.parallelism.pipeline_parallel_degree == 1:
        yield (
            f"{plan.num_batches} micro-batches of {plan.rows} rows, with half of the memory free: each gathers all "
            "weights again. Take fewer and larger ones."
        )
    if room and isinstance(step.activation_checkpoint, FullActivationCheckpoint.Config):
        yield "Full recomputation, with half of the memory free: SelectiveActivationCheckpoint computes less."
