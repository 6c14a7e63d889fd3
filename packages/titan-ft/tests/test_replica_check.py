"""Replicas with different settings do not train together, and no replica trains below the step of the group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from titan_ft import TorchftReplicaGroup
from titan_ft.transport import SnapshotTransport

Report = Callable[[Any], None]


def join(address: str, replica_id: int, **options: Any) -> TorchftReplicaGroup:
    options = {"process_group_timeout_ms": 20_000} | options
    return TorchftReplicaGroup.Config(replica_id=replica_id, lighthouse_address=address, **options).build()


def run(address: str, replica_id: int, identity: Any, width: int, until: str, report: Report) -> dict[str, Any]:
    """Train a weight of `width` numbers until the file `until` exists."""
    weight, step = torch.zeros(width), {"step": 0}
    group = join(address, replica_id, heal_timeout_ms=4_000)  # shorter than the lighthouse's heartbeat timeout

    def load(state: dict[str, Any]) -> None:
        weight.copy_(state["model"]["weight"])
        step.update(state["step"])

    group.register_state(lambda: {"model": {"weight": weight}, "step": dict(step)}, load, identity=identity)
    while not os.path.exists(until):
        _, count = group.begin_step()
        gradient = torch.ones(width)
        group.reduce_(gradient)
        if group.commit():
            weight += gradient / count
            step["step"] += 1
        report((step["step"], count))
    group.close()
    return {"weight": weight, "step": step["step"]}


@pytest.mark.parametrize(("identity", "width"), [({"lr": 0.2}, 3), ({"lr": 0.1}, 5)], ids=["settings", "model"])
def test_a_joining_replica_that_differs_ends_with_an_error_and_the_others_continue(
    start_replica, lighthouse, tmp_path, identity, width
):
    address, until = lighthouse(), str(tmp_path / "until")
    live = start_replica(run, address, 0, {"lr": 0.1}, 3, until)
    live.wait_for(lambda event: event[0] > 2)
    for _ in range(2 if width == 3 else 1):  # a restart by a supervisor does not end the others either
        other = start_replica(run, address, 1, identity, width, until)
        with pytest.raises(
            AssertionError, match=r"Replica 1 must have the same settings, model and mesh as the established"
        ):
            other.results()
    kind, (step, _) = live.next_message(0)
    assert kind == "event"
    live.wait_for(lambda event: event[0] > step + 3)
    start_replica(run, address, 1, {"lr": 0.1}, 3, until)
    live.wait_for(lambda event: event[1] == 2)
    (tmp_path / "until").touch()
    for result in live.results():
        assert torch.equal(result["weight"], torch.full((3,), float(result["step"])))


def fail_to_heal(address: str, replica_id: int, source: int, report: Report) -> None:
    """Join the group, lose the source during healing, and report what happens."""

    def source_dies(transport: SnapshotTransport, *args: Any, **kwargs: Any) -> None:
        os.kill(source, signal.SIGKILL)
        raise ConnectionResetError("the source is gone")

    SnapshotTransport.recv_checkpoint = source_dies
    group = join(address, replica_id, heal_timeout_ms=1_000)
    group.register_state(lambda: {"model": {}}, lambda state: None)
    report("joined")
    group.begin_step()
    report("trains")  # below the step of the group


def test_a_replica_whose_source_dies_during_healing_does_not_train(start_replica, lighthouse, tmp_path):
    address = lighthouse()
    live = start_replica(run, address, 0, None, 0, str(tmp_path / "never"))
    live.wait_for(lambda event: event[0] > 2)
    joining = start_replica(fail_to_heal, address, 1, live.processes[0].pid)
    with pytest.raises(
        AssertionError, match=r"This replica must heal to step .* of the group within 1000 ms, got no state"
    ):
        joining.wait_for(lambda event: event == "trains")


LIGHTHOUSE = """
import sys
from torchft.coordination import LighthouseServer
server = LighthouseServer(bind=f"127.0.0.1:{sys.argv[1]}", min_replicas=1, heartbeat_timeout_ms=2_000)
print("up", flush=True)
sys.stdin.read()
"""


def start_lighthouse(port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LIGHTHOUSE, str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    return process


def test_replicas_survive_a_restart_of_the_lighthouse(start_replica, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = start_lighthouse(port)
    live = start_replica(run, f"http://127.0.0.1:{port}", 0, None, 2, str(tmp_path / "until"))
    live.wait_for(lambda event: event[0] > 2)
    first.kill()
    first.wait()
    second = start_lighthouse(port)
    kind, (step, _) = live.next_message(0)
    assert kind == "event"
    live.wait_for(lambda event: event[0] > step + 20)
    (tmp_path / "until").touch()
    assert live.results()
    second.kill()
    second.wait()
