"""What would make a run fit, found by planning it; and what looks wasteful."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from titan_parallel.activation_checkpoint import FullRecompute, SelectiveRecompute
from titan_parallel.planning.report import Plan, Remedy
from titan_parallel.planning.simulate import Rows, Step
from titan_parallel.planning.sizes import show_bytes

ENOUGH = 2  # remedies that fit: the cheapest, and a choice
MAX_BUBBLE = 0.2


def remedies_of(step: Step, ranks_per_node: int, limit: int, peak_of: Callable[[Step], int]) -> list[Remedy]:
    """Changes with their peaks, cheapest first, each on top of those before it, until enough of them fit `limit`."""
    remedies: list[Remedy] = []
    for change, changed in _ladder(step, ranks_per_node):
        try:
            peak = peak_of(changed)
        except ValueError:  # heads, rows or ranks that do not divide: no remedy
            continue
        remedies.append(Remedy(change, peak, peak <= limit))
        if sum(remedy.fits for remedy in remedies) == ENOUGH:
            break
    return remedies


def _ladder(step: Step, ranks_per_node: int) -> Iterator[tuple[str, Step]]:
    """Runs with the same global batch: more recomputation, smaller micro-batches, more shards, tensor ranks, ranks."""
    changes: dict[str, str] = {}

    def rung(name: str, value: str) -> str:
        changes[name] = value
        return ", ".join(f"{name} {value}" for name, value in changes.items())

    for recomputation in (SelectiveRecompute, FullRecompute):
        now = step.activation_checkpoint
        if now is None or (isinstance(now, SelectiveRecompute.Config) and recomputation is FullRecompute):
            step = step.changed(activation_checkpoint=recomputation.Config())
            yield rung("activation_checkpoint", recomputation.__name__), step
    while step.batch.num_rows % 2 == 0:
        rows = Rows.of(step.batch, step.batch.num_rows // 2)
        step = step.changed(batch=rows, num_batches=step.num_batches * 2)
        yield rung("rows of a micro-batch", str(rows.num_rows)), step
    if step.parallelism.data_parallel_replicate_degree > 1:
        step = step.with_degrees(data_parallel_replicate_degree=1)
        yield rung("data_parallel_replicate_degree", "1"), step
    while (degree := step.parallelism.tensor_parallel_degree * 2) <= min(ranks_per_node, step.world_size):
        step = step.with_degrees(tensor_parallel_degree=degree).changed(num_batches=step.num_batches * 2)
        yield rung("tensor_parallel_degree", str(degree)), step
    while step.num_batches % 2 == 0:
        step = step.with_degrees().changed(world_size=step.world_size * 2, num_batches=step.num_batches // 2)
        yield rung("ranks", str(step.world_size)), step


def wasteful(plan: Plan, step: Step) -> list[str]:
    """A few things that are seldom meant."""
    return [line for rule in (_tensor_over_nodes, _replicated, _bubble, _small_batches) for line in rule(plan, step)]


def _tensor_over_nodes(plan: Plan, step: Step) -> Iterator[str]:
    for axis in plan.mesh:
        if axis.name == "tp" and axis.nodes > 1:
            yield (
                f"Tensor parallel over {axis.nodes} nodes: it exchanges several times a block, and waits for it. "
                f"Set tensor_parallel_degree to a divisor of {plan.ranks_per_node}."
            )


def _replicated(plan: Plan, step: Step) -> Iterator[str]:
    replicas = step.parallelism.data_parallel_replicate_degree
    stored = max(stage.parameters + stage.gradients + stage.optimizer for stage in plan.stages)
    if replicas > 1 and stored > plan.peak / 2:
        yield (
            f"{replicas} replicas, each of which holds all weights, gradients and optimizer state: "
            f"{show_bytes(stored)} of a rank's peak. Sharded they are {show_bytes(stored / replicas)}: set "
            "data_parallel_replicate_degree to 1."
        )


def _bubble(plan: Plan, step: Step) -> Iterator[str]:
    if plan.bubble is not None and plan.bubble > MAX_BUBBLE:
        yield (
            f"A pipeline bubble of {plan.bubble:.0%}: stages wait for each other. Take more micro-batches, an "
            "interleaved schedule, or fewer stages."
        )


def _small_batches(plan: Plan, step: Step) -> Iterator[str]:
    room = plan.device_memory is not None and plan.peak < plan.device_memory / 2
    if room and plan.num_batches > 1 and step.parallelism.pipeline_parallel_degree == 1:
        yield (
            f"{plan.num_batches} micro-batches of {plan.rows} rows, with half of the memory free: each gathers all "
            "weights again. Take fewer and larger ones."
        )
    if room and isinstance(step.activation_checkpoint, FullRecompute.Config):
        yield "Full recomputation, with half of the memory free: SelectiveRecompute computes less."
