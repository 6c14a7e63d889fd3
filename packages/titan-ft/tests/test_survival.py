"""Replicas train one model together; one is killed during a step, restarts and heals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from titan_ft import TorchftReplicaGroup
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

ROWS, WIDTH = 8, 6


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x, x.flip(1).cumsum(1)


def build_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH)).double()


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def flat_loop(steps: int) -> list[Tensor]:
    """Train the reference: one process, no groups, whole batches."""
    model = build_model(seed=0)
    optimizer = build_optimizer(model)
    for step in range(steps):
        x, y = global_batch(step)
        ((model(x) - y).square().sum() / ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def shard(model: nn.Module, hook: Callable[[Tensor], None]) -> None:
    """Apply FSDP over the ranks of this replica; `hook` sums over the replicas."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1)
            module.set_force_sum_reduction_for_comms(True)
            module.set_all_reduce_hook(hook)


class Replica:
    """A plain training loop in a replica group, on one rank or sharded over several."""

    def __init__(self, address: str, replica_id: int, life: int) -> None:
        self.rank, self.num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.group = TorchftReplicaGroup.Config(replica_id=replica_id, lighthouse_address=address).build()
        self.model = build_model(seed=life)  # a restarted replica starts with other weights
        if self.num_ranks > 1:
            shard(self.model, self.group.reduce_)
        self.optimizer = build_optimizer(self.model)
        self.step, self.life = 0, life
        self.group.register_state(self.state_dict, self.load_state_dict)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def train_step(self, dies_with: int) -> dict[str, Any]:
        """Train one step; `lives` in the result is the number of ranks that have been restarted."""
        index, num_replicas = self.group.begin_step()
        event = {"step": self.step, "index": index, "num_replicas": num_replicas}
        dp_rank, dp_size = index * self.num_ranks + self.rank, num_replicas * self.num_ranks
        x, y = (samples[dp_rank::dp_size] for samples in global_batch(self.step))
        totals = torch.tensor([len(x), self.life])
        if self.num_ranks > 1:
            dist.all_reduce(totals)
        self.group.reduce_(totals)
        if num_replicas == dies_with and self.step >= 3:
            os.kill(os.getpid(), signal.SIGKILL)
        ((self.model(x) - y).square().sum() / totals[0]).backward()
        if self.num_ranks == 1:
            for p in self.model.parameters():
                self.group.reduce_(p.grad)
        committed = self.group.commit()
        if committed:
            self.optimizer.step()
            self.step += 1
        self.optimizer.zero_grad()
        return event | {"committed": committed, "lives": int(totals[1])}

    def weights(self) -> list[Tensor]:
        return [p.full_tensor() if isinstance(p, DTensor) else p for p in self.model.state_dict().values()]


def train(address: str, replica_id: int, life: int, dies_with: int, report: Callable[[Any], None]) -> dict[str, Any]:
    """Train until four steps after the first committed step with a restarted replica."""
    replica = Replica(address, replica_id, life)
    events: list[dict[str, Any]] = []
    last_step: int | None = None
    while last_step is None or replica.step < last_step:
        events.append(replica.train_step(dies_with))
        report(events[-1])
        if last_step is None and events[-1]["committed"] and events[-1]["lives"]:
            last_step = replica.step + 4
        time.sleep(0.02)  # keeps the survivor from running thousands of steps ahead
    replica.group.close()
    return {"events": events, "step": replica.step, "weights": replica.weights()}


def train_together(address: str, replica_id: int, steps: int, report: Callable[[Any], None]) -> dict[str, Any]:
    replica = Replica(address, replica_id, life=replica_id)  # different weights: all heal from the first replica
    while replica.step < steps:
        replica.train_step(dies_with=-1)
    replica.group.close()
    return {"step": replica.step, "weights": replica.weights()}


def assert_one_model(results: list[dict[str, Any]]) -> None:
    """Check that all ranks have the same bits, and the weights of one process that trained on the same batches."""
    for result in results:
        assert result["step"] == results[0]["step"]
        for mine, theirs in zip(result["weights"], results[0]["weights"], strict=True):
            assert torch.equal(mine, theirs)
        for mine, reference in zip(result["weights"], flat_loop(result["step"]), strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_replica_costs_one_step_and_heals_after_a_restart(start_replica, lighthouse, num_ranks):
    address = lighthouse()
    survivor = start_replica(train, address, 0, 0, -1, num_ranks=num_ranks)
    victim = start_replica(train, address, 1, 0, 2, num_ranks=num_ranks)
    assert victim.exit_codes() == [-signal.SIGKILL] * num_ranks
    survivor.wait_for(lambda event: event["num_replicas"] == 2 and not event["committed"])
    survivor.wait_for(lambda event: event["num_replicas"] == 1 and event["committed"])
    healed = start_replica(train, address, 1, 1, -1, num_ranks=num_ranks)

    first, second = survivor.results(), healed.results()
    assert_one_model(first + second)

    events = first[0]["events"]
    committed = [event["step"] for event in events if event["committed"]]
    assert committed == list(range(first[0]["step"]))  # each batch is trained on once
    lost = next(event for event in events if not event["committed"] and event["num_replicas"] == 2)
    again = next(event for event in events if event["committed"] and event["step"] == lost["step"])
    assert again["num_replicas"] == 1  # the survivor took the whole batch of the lost step
    joined = next(event for event in second[0]["events"] if event["num_replicas"] == 2)
    assert joined["step"] > lost["step"]  # healed before drawing the batch


def reduce_only_vectors(group: TorchftReplicaGroup, tensor: Tensor) -> None:
    if tensor.ndim < 2:
        original_reduce_(group, tensor)


original_reduce_ = TorchftReplicaGroup.reduce_
BREAKS = {
    "none": lambda monkeypatch: None,
    "reduction": lambda monkeypatch: monkeypatch.setattr(TorchftReplicaGroup, "reduce_", reduce_only_vectors),
    "healing": lambda monkeypatch: monkeypatch.setattr(Replica, "load_state_dict", lambda replica, state: None),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_check_detects_a_missing_reduction_or_healing(start_replica, lighthouse, monkeypatch, broken):
    BREAKS[broken](monkeypatch)
    address = lighthouse(min_replicas=2)
    replicas = [start_replica(train_together, address, i, 3) for i in range(2)]
    results = [replica.results()[0] for replica in replicas]
    with pytest.raises(AssertionError) if broken != "none" else nullcontext():
        assert_one_model(results)
