"""Replicas of a training process that train one model together, and may die and come back: torchft in five methods."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from titan_config import ConfigError, Configurable
from torch import Tensor

from titan_ft.logs import calm_torchft
from titan_ft.network import address_towards, in_url, open_store, replica_rank
from titan_ft.progress import Progress
from titan_ft.replica_check import Told, differing, digest_of, exchange
from titan_ft.snapshot import Snapshot, State, check_leaves, meshes_of, put_together, take

log = logging.getLogger(__name__)


class TorchftReplicaGroup(Configurable):
    """This rank's part in a group of replicas, each of one or more ranks, that meet at a torchft lighthouse.

    Build it on every rank; after `init_process_group`, if a replica has more than one. Rank r of a replica exchanges
    with rank r of the others: shard inside a replica as you like, alike in all of them. Each step goes

        index, num_replicas = group.begin_step()     # draw this replica's share of the batch
        group.reduce_(gradient)                      # for each gradient, and for all that is counted
        if group.commit():
            optimizer.step()                         # else: drop the gradients, give the batch back
    """

    class Config(Configurable.Config):
        replica_id: int
        """Of this replica among all that may exist; the same after a restart."""
        min_replica_size: int = 1
        """A step in which fewer replicas take part does not commit."""
        process_group: Literal["gloo", "nccl"] = "gloo"
        """What carries the sums."""
        process_group_timeout_ms: int = 10_000
        """How long a sum waits for the other replicas before the step fails. They wait for a newcomer to heal, too."""
        quorum_timeout_ms: int = 60_000
        """How long `begin_step` waits for enough replicas to be ready, each time it asks."""
        quorum_retries: int = 10
        """How often `begin_step` asks again, so that a lighthouse may be started anew without ending the replicas."""
        heal_timeout_ms: int = 600_000
        """How long moving the state to a newcomer may take."""
        max_failed_steps: int = 20
        """So many failed steps in a row are lost time; one more ends this replica."""
        lighthouse_address: str | None = None
        """Where the replicas meet: `http://host:port`. None: what the environment's TORCHFT_LIGHTHOUSE says."""

        def validate(self) -> None:
            for name in ("replica_id", "max_failed_steps", "quorum_retries"):
                _require_at_least(self, name, 0)
            for name in ("min_replica_size", "process_group_timeout_ms", "quorum_timeout_ms", "heal_timeout_ms"):
                _require_at_least(self, name, 1)

    def __init__(self, config: Config) -> None:
        calm_torchft()
        self._config = config
        self._lighthouse = _lighthouse_address(config)
        self._host = address_towards(self._lighthouse)
        self._process_group = _build_process_group(config)
        self._store = open_store(self._host)
        self._manager = self._build_manager()
        self._state_dict: Callable[[], State] | None = None
        self._load_state_dict: Callable[[State], None] | None = None
        self._received: Snapshot | None = None
        self._num_failed_steps = 0
        self._progress = Progress(self._store)
        self._told, self._compared_quorum = Told(config.replica_id, "", established=False), -1

    def register_state(
        self,
        state_dict: Callable[[], State],
        load_state_dict: Callable[[State], None],
        step: int = 0,
        identity: Any = None,
    ) -> None:
        """State what heals a newcomer; call it before the first step.

        `state_dict()` gives this rank's part: a nested dictionary of tensors, `DTensor`s and JSON values. It is called
        in a thread of torchft's while `begin_step` waits, and copied at once. `load_state_dict` gets the like, with
        `DTensor`s on this replica's own mesh, before `begin_step` returns. `step` is how many steps lie behind this
        replica (of the checkpoint it went on from): where all start anew, who is behind heals from who is furthest.
        `identity` (JSON values, such as the learning rate) and the shapes in `state_dict()["model"]` are the same in
        all replicas; one that joins and differs ends.

        Raises TypeError for a state that holds anything else.
        """
        state = state_dict()
        check_leaves(state)
        self._told = self._told._replace(digest=digest_of(identity, state, self._store))
        self._state_dict, self._load_state_dict = state_dict, load_state_dict
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    def begin_step(self) -> tuple[int, int]:
        """Fix who takes part in this step, and heal this replica if it is behind; return (my index, how many).

        A replica that differs and tries to join costs the others only the time of its try. Raises RuntimeError if too
        few replicas were ready in `quorum_timeout_ms`, asked `quorum_retries` + 1 times, if healing failed for
        `heal_timeout_ms`, and on a replica that differs from those already there: end it and start it again.
        """
        if self._state_dict is None or self._load_state_dict is None:
            raise RuntimeError(
                "Got begin_step() before register_state(). A replica that joins takes the weights of the others. "
                "Register the functions that return and take this replica's state."
            )
        behind_since = None
        while not ((may_begin := self._may_begin()) and self._all_alike()):
            self._received = None
            self._process_group.abort()  # the others need not wait for this replica
            self._manager.should_commit()  # False: an error was reported
            behind_since = None if may_begin else behind_since or time.monotonic()
            self._check_behind(behind_since)
        if self._received is not None:
            snapshot, self._received = self._received, None
            self._load_state_dict(put_together(snapshot, meshes_of(self._state_dict())))
        return self._manager.participating_rank(), self._manager.num_participants()

    def _may_begin(self) -> bool:
        """Ask for a quorum; return False if this replica is behind it, as its source died while it healed."""
        before = self._manager.state_dict()
        try:
            self._manager.start_quorum()
        except (RuntimeError, TimeoutError) as error:
            raise self._no_quorum() from error
        quorum = self._manager._client.last
        if not self._progress.is_behind(quorum, self._manager.current_step()):
            return True
        self._manager.load_state_dict(before)  # other ranks of this replica may have healed
        self._manager.report_error(RuntimeError("This replica is behind the group and could not heal."))
        time.sleep(0.2)
        return False

    def _check_behind(self, since: float | None) -> None:
        """Raise RuntimeError for a replica that has been behind the group for `heal_timeout_ms`."""
        if since is not None and time.monotonic() - since > self._config.heal_timeout_ms / 1000:
            raise RuntimeError(
                f"A replica must train from the step of the group, {self._progress.furthest}, got no state of it in "
                f"{self._config.heal_timeout_ms} ms. Start this replica again."
            )

    def _all_alike(self) -> bool:
        """Compare the replicas of a new quorum; return False if one that joins differs, and raise on that one."""
        quorum = self._manager._client.last
        if quorum.quorum_id == self._compared_quorum or self._manager.errored() is not None:
            return True
        try:
            replicas = exchange(quorum, self._told, timedelta(milliseconds=self._config.process_group_timeout_ms))
        except (RuntimeError, TimeoutError) as error:
            self._manager.report_error(error)
            return True  # the step fails; compared again at the next
        different = differing(replicas)
        if quorum.replica_rank in different:
            self.close()
            raise RuntimeError(
                f"Replica {self._config.replica_id} must have the settings, model and mesh of the replicas that train, "
                f"got others. Start it with the same config."
            )
        if different:
            names = ", ".join(str(replicas[index].replica_id) for index in different)
            log.warning("Replica %s differs in settings, model or mesh and was left out.", names)
            self._manager.report_error(RuntimeError("A replica that differs has tried to join."))
            return False
        self._compared_quorum = quorum.quorum_id
        return True

    @torch.no_grad()
    def reduce_(self, tensor: Tensor) -> None:
        """Sum `tensor` over the replicas of this step, in place; exact for integers, int64 included.

        Every replica reduces the same tensors in the same order, as an FSDP all-reduce hook does. Nothing is raised
        for a replica that is lost: `tensor` then holds nothing of meaning, the step's later sums come back at once,
        and `commit()` is False.
        """
        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()

    def commit(self) -> bool:
        """Return whether the weights may change: every rank of every replica got here with all of its sums.

        False: drop the gradients and give the batch back; the next `begin_step` is without whoever was lost. Raises
        RuntimeError after more than `max_failed_steps` in a row.
        """
        self.reduce_(torch.ones(1, device="cpu" if self._config.process_group == "gloo" else "cuda"))  # all are here
        failure = self._manager.errored()
        if failure is not None:
            self._process_group.abort()  # who waits in a sum for this rank need not wait for the timeout
        if self._manager.should_commit():
            self._num_failed_steps, self._told = 0, self._told._replace(established=True)
            return True
        self._count_failure(failure.original_exception if failure is not None else None)
        return False

    def close(self) -> None:
        """Leave the group. The others go on."""
        self._manager.shutdown()
        self._process_group.abort(errored=False)

    def _build_manager(self) -> Any:
        from torchft.manager import Manager

        from titan_ft.progress import RecordingClient
        from titan_ft.transport import SnapshotTransport

        rank, num_ranks = replica_rank()
        quorum_timeout = timedelta(milliseconds=self._config.quorum_timeout_ms)
        heal_timeout = timedelta(milliseconds=self._config.heal_timeout_ms)
        try:
            manager = Manager(
                pg=self._process_group,
                state_dict=self._give,
                load_state_dict=self._receive,
                min_replica_size=self._config.min_replica_size,
                use_async_quorum=False,  # who is in is known before the batch is drawn
                timeout=heal_timeout,
                quorum_timeout=quorum_timeout,
                connect_timeout=quorum_timeout,
                rank=rank,
                world_size=num_ranks,
                store_addr=self._store.host,
                store_port=self._store.port,
                lighthouse_addr=self._lighthouse,
                replica_id=f"replica_{self._config.replica_id}",
                hostname=in_url(self._host),
                checkpoint_transport=SnapshotTransport(self._host, heal_timeout),
                quorum_retries=self._config.quorum_retries,
            )
            manager._client = RecordingClient(manager._client)
            return manager
        except (RuntimeError, TimeoutError) as error:
            raise self._no_quorum() from error

    def _give(self) -> Snapshot:
        assert self._state_dict is not None
        return take(self._state_dict())

    def _receive(self, snapshot: Snapshot) -> None:
        self._received = snapshot

    def _count_failure(self, cause: Exception | None) -> None:
        self._num_failed_steps += 1
        log.warning("A step failed, %d in a row: %s", self._num_failed_steps, cause or "another rank had an error")
        if self._num_failed_steps > self._config.max_failed_steps:
            raise RuntimeError(
                f"Got {self._num_failed_steps} failed steps in a row. A group loses a step or two when a replica dies, "
                "not this many. Look at the cause above and at the timeouts, then start this replica again."
            ) from cause

    def _no_quorum(self) -> RuntimeError:
        return RuntimeError(
            f"The lighthouse at {self._lighthouse} must answer in {self._config.quorum_timeout_ms} ms (asked "
            f"{self._config.quorum_retries + 1} times), got no quorum. See that it runs, that it can be reached from "
            "here, and that as many replicas as its min_replicas are alive; then start this replica again."
        )


def _require_at_least(config: Configurable.Config, name: str, least: int) -> None:
    value = getattr(config, name)
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}.")


def _lighthouse_address(config: TorchftReplicaGroup.Config) -> str:
    address = config.lighthouse_address or os.environ.get("TORCHFT_LIGHTHOUSE")
    if address is None:
        raise ValueError(
            "Got no address of a lighthouse. The replicas meet there. Start torchft_lighthouse, and set "
            "lighthouse_address or the environment's TORCHFT_LIGHTHOUSE to http://host:port."
        )
    return address


def _build_process_group(config: TorchftReplicaGroup.Config) -> Any:
    from torchft.process_group import ProcessGroupGloo, ProcessGroupNCCL

    timeout = timedelta(milliseconds=config.process_group_timeout_ms)
    if config.process_group == "gloo":
        return ProcessGroupGloo(timeout=timeout)
    if not torch.cuda.is_available():
        raise ValueError("Got process_group nccl, and no GPU. NCCL sums tensors on GPUs. Set process_group to gloo.")
    return ProcessGroupNCCL(timeout=timeout)
