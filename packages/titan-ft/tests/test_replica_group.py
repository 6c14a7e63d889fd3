"""The five methods: exact sums, unanimous commits, healing from the highest step, and errors that state the fix."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from titan_config import ConfigError
from titan_ft import TorchftReplicaGroup, local_lighthouse
from torch import Tensor

Report = Callable[[Any], None]


def join(address: str, replica_id: int, **options: Any) -> TorchftReplicaGroup:
    return TorchftReplicaGroup.Config(replica_id=replica_id, lighthouse_address=address, **options).build()


def unsummable() -> Tensor:
    """Return a tensor whose reduction fails at once: gloo cannot add its dtype."""
    return torch.zeros(4, dtype=torch.float8_e4m3fn)


def summands(replica_id: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(replica_id)
    floats = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for shape in [(1000,), (7, 3, 5), ()]
    ]
    large = torch.tensor([2**53 + 1, -(2**61) + replica_id, 3 * replica_id])  # not representable in float64
    return [*floats, large, large.to(torch.int32), torch.empty(0), torch.randn(4, 6, generator=generator).t()]


def sum_all(address: str, replica_id: int, report: Report) -> dict[str, Any]:
    group = join(address, replica_id)
    group.register_state(dict, lambda state: None)
    place = group.begin_step()
    sums = summands(replica_id)
    for tensor in sums:
        group.reduce_(tensor)
    committed = group.commit()
    group.close()
    return {"place": place, "sums": sums, "committed": committed}


def test_sums_over_replicas_are_exact_in_every_dtype(start_replica, lighthouse):
    address = lighthouse(min_replicas=2)
    replicas = [start_replica(sum_all, address, i) for i in range(2)]
    results = [replica.results()[0] for replica in replicas]
    assert [result["place"] for result in results] == [(0, 2), (1, 2)]
    assert all(result["committed"] for result in results)
    for result in results:
        for got, a, b in zip(result["sums"], summands(0), summands(1), strict=True):
            assert got.dtype == a.dtype
            assert torch.equal(got, a + b)


def fail_one_sum(address: str, replica_id: int, report: Report) -> list[Any]:
    group = join(address, replica_id, process_group_timeout_ms=600_000)
    group.register_state(dict, lambda state: None)
    steps = []
    for broken in (False, True, False):
        num_replicas = group.begin_step()[1]
        for number in range(4):
            tensor = torch.ones(4)
            group.reduce_(unsummable() if broken and number == 1 and replica_id == 1 else tensor)
        steps.append((num_replicas, group.commit(), tensor.tolist()))
    group.close()
    return steps


def test_a_failed_reduction_on_one_replica_fails_only_this_step_on_all(start_replica, lighthouse):
    address = lighthouse(min_replicas=2)
    replicas = [start_replica(fail_one_sum, address, i) for i in range(2)]
    for steps in [replica.results()[0] for replica in replicas]:
        assert [(num_replicas, committed) for num_replicas, committed, _ in steps] == [(2, True), (2, False), (2, True)]
        assert steps[0][2] == steps[2][2] == [2.0] * 4


def fail_on_one_rank(address: str, replica_id: int, report: Report) -> bool:
    group = join(address, replica_id, process_group_timeout_ms=600_000)
    group.register_state(dict, lambda state: None)
    group.begin_step()
    group.reduce_(unsummable() if replica_id == dist.get_rank() == 1 else torch.ones(4))
    committed = group.commit()
    dist.barrier()
    group.close()
    return committed


def test_a_failed_reduction_on_one_rank_fails_the_step_on_all_ranks_of_all_replicas(start_replica, lighthouse):
    address = lighthouse(min_replicas=2)
    replicas = [start_replica(fail_on_one_rank, address, i, num_ranks=2) for i in range(2)]
    assert [replica.results() for replica in replicas] == [[False, False], [False, False]]


def resume_at(address: str, replica_id: int, steps: list[int], report: Report) -> int:
    state = {"step": steps[replica_id]}
    group = join(address, replica_id)
    group.register_state(lambda: state, state.update, step=state["step"])
    group.begin_step()
    assert group.commit()
    dist.barrier()
    group.close()
    return state["step"]


@pytest.mark.parametrize("steps", [[5, 3], [3, 5]])
def test_after_a_restart_of_all_replicas_all_ranks_heal_from_the_highest_step(start_replica, lighthouse, steps):
    address = lighthouse(min_replicas=2)
    replicas = [start_replica(resume_at, address, i, steps, num_ranks=2) for i in range(2)]
    assert [replica.results() for replica in replicas] == [[5, 5], [5, 5]]


def train_alone(
    address: str, options: dict[str, Any], num_steps: int, sums: list[Tensor], report: Report
) -> list[bool]:
    group = join(address, 0, **options)
    group.register_state(dict, lambda state: None)
    committed = []
    for _ in range(num_steps):
        assert group.begin_step() == (0, 1)
        for tensor in sums:
            group.reduce_(tensor)
        committed.append(group.commit())
        report(committed[-1])
    group.close()
    return committed


def test_a_single_replica_commits_unless_min_replica_size_is_higher(start_replica, lighthouse):
    address = lighthouse()
    assert start_replica(train_alone, address, {}, 2, [torch.ones(2)]).results() == [[True, True]]
    address = lighthouse()
    assert start_replica(train_alone, address, {"min_replica_size": 2}, 2, []).results() == [[False, False]]


def test_a_replica_ends_after_too_many_consecutive_failed_steps_and_gives_the_cause(start_replica, lighthouse):
    address = lighthouse()
    replica = start_replica(train_alone, address, {"max_failed_steps": 1}, 5, [unsummable()])
    assert replica.next_message(0) == ("event", False)
    with pytest.raises(AssertionError, match=r"(?s)Invalid scalar type.*At most 1 consecutive steps may fail, got 2"):
        replica.next_message(0)


def hang(address: str, replica_id: int, report: Report) -> tuple[bool, float]:
    group = join(address, replica_id, process_group_timeout_ms=3_000)
    group.register_state(dict, lambda state: None)
    group.begin_step()
    if replica_id == 1:
        signal.pause()
    start = time.monotonic()
    group.reduce_(torch.ones(4))
    return group.commit(), time.monotonic() - start


def test_a_replica_that_hangs_fails_the_step_after_the_timeout(start_replica, lighthouse):
    address = lighthouse(min_replicas=2)
    replicas = [start_replica(hang, address, i) for i in range(2)]
    committed, seconds = replicas[0].results()[0]
    assert not committed
    assert seconds >= 3


def join_the_lighthouse_of_the_environment(report: Report) -> tuple[tuple[int, int], bool]:
    with local_lighthouse() as address:
        os.environ["TORCHFT_LIGHTHOUSE"] = address
        group = TorchftReplicaGroup.Config(replica_id=3).build()
        group.register_state(dict, lambda state: None)
        place = group.begin_step()
        committed = group.commit()
        group.close()
    return place, committed


def test_the_environment_may_set_the_address_of_the_lighthouse(start_replica):
    assert start_replica(join_the_lighthouse_of_the_environment).results() == [((0, 1), True)]


def test_a_missing_or_invalid_lighthouse_address_is_an_error_that_states_the_fix(monkeypatch):
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    with pytest.raises(ValueError, match=r"address of the lighthouse must be set, got None.*Start torchft_lighthouse"):
        TorchftReplicaGroup.Config(replica_id=0).build()
    with pytest.raises(ValueError, match=r"The lighthouse address must be http://host:port, got 'localhost'"):
        join("localhost", 0)
    with pytest.raises(
        ValueError, match=r"must be reachable from every rank, got .* for 'no-such-host.invalid'.*Use its IP address"
    ):
        join("http://no-such-host.invalid:29510", 0)


def join_an_unreachable_lighthouse(report: Report) -> None:
    with pytest.raises(RuntimeError, match=r"The lighthouse at http://127.0.0.1:9 must answer within 500 ms"):
        join("http://127.0.0.1:9", 0, quorum_timeout_ms=500, quorum_retries=0)


def wait_in_vain(address: str, report: Report) -> None:
    group = join(address, 0, quorum_timeout_ms=3_000, quorum_retries=0)
    group.register_state(dict, lambda state: None)
    with pytest.raises(
        RuntimeError, match=r"must answer within 3000 ms \(1 requests\), got no.*min_replicas live replicas"
    ):
        group.begin_step()
    group.close()


def test_a_quorum_timeout_is_an_error_that_states_the_fix(start_replica, lighthouse):
    start_replica(join_an_unreachable_lighthouse).results()
    start_replica(wait_in_vain, lighthouse(min_replicas=2)).results()


def begin_without_a_state(address: str, report: Report) -> None:
    group = join(address, 0)
    with pytest.raises(RuntimeError, match=r"register_state\(\) must be called before begin_step\(\)"):
        group.begin_step()
    with pytest.raises(
        TypeError, match=r"random\.cpu in the registered state must be a tensor or a JSON value, got Gen"
    ):
        group.register_state(lambda: {"random": {"cpu": torch.Generator()}}, lambda state: None)
    group.close()


def test_a_group_without_a_registered_state_does_not_begin(start_replica, lighthouse):
    start_replica(begin_without_a_state, lighthouse()).results()


@pytest.mark.parametrize(
    "field", ["min_replica_size", "process_group_timeout_ms", "quorum_timeout_ms", "heal_timeout_ms"]
)
def test_invalid_settings_are_rejected(field):
    with pytest.raises(ConfigError, match=f"{field} must be at least 1, got 0"):
        TorchftReplicaGroup.Config(replica_id=0, **{field: 0}).build()
    with pytest.raises(ConfigError, match="replica_id must be at least 0, got -1"):
        TorchftReplicaGroup.Config(replica_id=-1).build()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error on a machine without GPUs")
def test_nccl_needs_a_gpu():
    with pytest.raises(ValueError, match='process_group must be "gloo" on a machine without GPUs'):
        join("http://127.0.0.1:9", 0, process_group="nccl")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL sums tensors on GPUs")
def test_a_single_replica_commits_on_nccl(start_replica, lighthouse):
    assert start_replica(train_alone, lighthouse(), {"process_group": "nccl"}, 2, []).results() == [[True, True]]
