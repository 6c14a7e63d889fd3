"""Fault-tolerant replica groups: replicas that train one model together and may fail and rejoin, on top of torchft."""

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

from titan_ft.logs import silence_torchft_logging
from titan_ft.network import local_address, open_store, replica_rank, url_host
from titan_ft.progress import Progress
from titan_ft.replica_check import ReplicaInfo, compute_digest, exchange_info, mismatched_replicas
from titan_ft.snapshot import Snapshot, State, check_leaves, meshes_of, restore_snapshot, take_snapshot

log = logging.getLogger(__name__)


class TorchftReplicaGroup(Configurable):
    """This rank's membership in a group of replicas, each of one or more ranks, that meet at a torchft lighthouse.

    Build it on every rank, after `init_process_group` if a replica has more than one rank. Rank r of a replica
    communicates with rank r of the others; sharding inside a replica is free, but must be the same in all replicas.
    Each step is

            index, num_replicas = group.begin_step()     # draw this replica's share of the batch
            group.reduce_(gradient)                      # for each gradient, and for each count
            if group.commit():
                optimizer.step()                         # else: drop the gradients, reuse the batch
    """

    class Config(Configurable.Config):
        replica_id: int
        """Id of this replica among all replicas of the group; the same after a restart."""
        min_replica_size: int = 1
        """Minimum number of replicas in a step; a step with fewer does not commit."""
        process_group: Literal["gloo", "nccl"] = "gloo"
        """Backend of the reductions over replicas."""
        process_group_timeout_ms: int = 10_000
        """Time that a reduction waits for the other replicas, including for one that heals, before the step fails."""
        quorum_timeout_ms: int = 60_000
        """Time that each quorum request of `begin_step` waits for enough replicas."""
        quorum_retries: int = 10
        """Number of repeated quorum requests in `begin_step`, so that replicas survive a restart of the lighthouse."""
        heal_timeout_ms: int = 600_000
        """Time limit for the transfer of the state to a replica that joins."""
        max_failed_steps: int = 20
        """Number of consecutive failed steps that are tolerated; one more ends this replica."""
        lighthouse_address: str | None = None
        """Address of the lighthouse, `http://host:port`. None: the environment variable TORCHFT_LIGHTHOUSE."""

        def validate(self) -> None:
            for name in ("replica_id", "max_failed_steps", "quorum_retries"):
                _require_at_least(self, name, 0)
            for name in ("min_replica_size", "process_group_timeout_ms", "quorum_timeout_ms", "heal_timeout_ms"):
                _require_at_least(self, name, 1)

    def __init__(self, config: Config) -> None:
        silence_torchft_logging()
        self._config = config
        self._lighthouse = _lighthouse_address(config)
        self._host = local_address(self._lighthouse)
        self._process_group = _build_process_group(config)
        self._store = open_store(self._host)
        self._manager = self._build_manager()
        self._state_dict: Callable[[], State] | None = None
        self._load_state_dict: Callable[[State], None] | None = None
        self._received: Snapshot | None = None
        self._num_failed_steps = 0
        self._progress = Progress(self._store)
        self._info, self._compared_quorum = ReplicaInfo(config.replica_id, "", established=False), -1

    def register_state(
        self,
        state_dict: Callable[[], State],
        load_state_dict: Callable[[State], None],
        step: int = 0,
        identity: Any = None,
    ) -> None:
        """Register the functions that save and load the state of this replica; call it before the first step.

        `state_dict()` returns the state of this rank: a nested dictionary of tensors, `DTensor`s and JSON values. A
        torchft thread calls it while `begin_step` waits, and copies the result at once. `load_state_dict` receives the
        same structure, with `DTensor`s on the mesh of this replica, before `begin_step` returns. `step` is the number
        of steps that this replica has completed (that of its checkpoint): if all replicas restart, those behind heal
        from the one with the highest step. `identity` (JSON values, such as the learning rate) and the shapes in
        `state_dict()["model"]` must be the same in all replicas; a replica that joins with other ones ends.

        Raises TypeError if the state contains other types.
        """
        state = state_dict()
        check_leaves(state)
        self._info = self._info._replace(digest=compute_digest(identity, state, self._store))
        self._state_dict, self._load_state_dict = state_dict, load_state_dict
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    def begin_step(self) -> tuple[int, int]:
        """Agree on the replicas of this step and heal this one if it is behind; return (index, number of replicas).

        A replica with other settings that tries to join delays the others only by its attempt. Raises RuntimeError if
        too few replicas were ready within `quorum_timeout_ms` in `quorum_retries` + 1 requests, if healing failed for
        `heal_timeout_ms`, or if this replica differs from the established ones: end it and restart it.
        """
        if self._state_dict is None or self._load_state_dict is None:
            raise RuntimeError(
                "register_state() must be called before begin_step(): a replica that joins needs the state of the "
                "others."
            )
        behind_since = None
        while not ((is_current := self._join_quorum()) and self._replicas_match()):
            self._received = None
            self._process_group.abort()  # the others need not wait for this replica
            self._manager.should_commit()  # False: an error was reported
            behind_since = None if is_current else behind_since or time.monotonic()
            self._check_heal_timeout(behind_since)
        if self._received is not None:
            snapshot, self._received = self._received, None
            self._load_state_dict(restore_snapshot(snapshot, meshes_of(self._state_dict())))
        return self._manager.participating_rank(), self._manager.num_participants()

    def _join_quorum(self) -> bool:
        """Request a quorum; return False if this replica is still behind, as when its source died during healing."""
        before = self._manager.state_dict()
        try:
            self._manager.start_quorum()
        except (RuntimeError, TimeoutError) as error:
            raise self._quorum_error() from error
        quorum = self._manager._client.last_quorum
        if not self._progress.is_behind(quorum, self._manager.current_step()):
            return True
        self._manager.load_state_dict(before)  # other ranks of this replica may have healed
        self._manager.report_error(RuntimeError("This replica is behind the group and could not heal."))
        time.sleep(0.2)
        return False

    def _check_heal_timeout(self, since: float | None) -> None:
        """Raise RuntimeError if this replica has been behind the group for `heal_timeout_ms`."""
        if since is not None and time.monotonic() - since > self._config.heal_timeout_ms / 1000:
            raise RuntimeError(
                f"This replica must heal to step {self._progress.max_step} of the group within "
                f"{self._config.heal_timeout_ms} ms, got no state. Restart this replica."
            )

    def _replicas_match(self) -> bool:
        """Compare the replicas of a new quorum; return False if another replica differs, raise if this one does."""
        quorum = self._manager._client.last_quorum
        if quorum.quorum_id == self._compared_quorum or self._manager.errored() is not None:
            return True
        try:
            replicas = exchange_info(quorum, self._info, timedelta(milliseconds=self._config.process_group_timeout_ms))
        except (RuntimeError, TimeoutError) as error:
            self._manager.report_error(error)
            return True  # the step fails; the next one compares again
        different = mismatched_replicas(replicas)
        if quorum.replica_rank in different:
            self.close()
            raise RuntimeError(
                f"Replica {self._config.replica_id} must have the same settings, model and mesh as the established "
                "replicas, got different ones. Start it with the same config."
            )
        if different:
            names = ", ".join(str(replicas[index].replica_id) for index in different)
            log.warning("Excluded replica %s, which differs in settings, model or mesh.", names)
            self._manager.report_error(RuntimeError("A replica with different settings tried to join."))
            return False
        self._compared_quorum = quorum.quorum_id
        return True

    @torch.no_grad()
    def reduce_(self, tensor: Tensor) -> None:
        """Sum `tensor` over the replicas of this step, in place; exact for integers, including int64.

        Every replica must reduce the same tensors in the same order, as an FSDP all-reduce hook does. A lost replica
        raises no error here: `tensor` is then meaningless, later reductions of the step return immediately, and
        `commit()` returns False.
        """
        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()

    def commit(self) -> bool:
        """Return whether to apply the step: whether every rank of every replica completed all of its reductions.

        If False, drop the gradients and reuse the batch; the next `begin_step` excludes lost replicas. Raises
        RuntimeError after more than `max_failed_steps` consecutive failed steps.
        """
        device = "cpu" if self._config.process_group == "gloo" else "cuda"
        self.reduce_(torch.ones(1, device=device))  # returns only after all replicas have reached this point
        failure = self._manager.errored()
        if failure is not None:
            self._process_group.abort()  # ranks that wait for this one in a reduction need not time out
        if self._manager.should_commit():
            self._num_failed_steps, self._info = 0, self._info._replace(established=True)
            return True
        self._count_failure(failure.original_exception if failure is not None else None)
        return False

    def close(self) -> None:
        """Leave the group; the other replicas continue."""
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
                state_dict=self._provide_state,
                load_state_dict=self._store_received,
                min_replica_size=self._config.min_replica_size,
                use_async_quorum=False,  # the replicas of a step are known before its batch is drawn
                timeout=heal_timeout,
                quorum_timeout=quorum_timeout,
                connect_timeout=quorum_timeout,
                rank=rank,
                world_size=num_ranks,
                store_addr=self._store.host,
                store_port=self._store.port,
                lighthouse_addr=self._lighthouse,
                replica_id=f"replica_{self._config.replica_id}",
                hostname=url_host(self._host),
                checkpoint_transport=SnapshotTransport(self._host, heal_timeout),
                quorum_retries=self._config.quorum_retries,
            )
            manager._client = RecordingClient(manager._client)
            return manager
        except (RuntimeError, TimeoutError) as error:
            raise self._quorum_error() from error

    def _provide_state(self) -> Snapshot:
        assert self._state_dict is not None
        return take_snapshot(self._state_dict())

    def _store_received(self, snapshot: Snapshot) -> None:
        self._received = snapshot

    def _count_failure(self, cause: Exception | None) -> None:
        self._num_failed_steps += 1
        log.warning(
            "A step failed (%d consecutive failures): %s", self._num_failed_steps, cause or "another rank had an error"
        )
        if self._num_failed_steps > self._config.max_failed_steps:
            raise RuntimeError(
                f"At most {self._config.max_failed_steps} consecutive steps may fail, got {self._num_failed_steps}; a "
                "dead replica costs only one or two. Check the cause above and the timeouts, then restart this "
                "replica."
            ) from cause

    def _quorum_error(self) -> RuntimeError:
        return RuntimeError(
            f"The lighthouse at {self._lighthouse} must answer within {self._config.quorum_timeout_ms} ms "
            f"({self._config.quorum_retries + 1} requests), got no quorum. Check that it runs, is reachable from here "
            "and has min_replicas live replicas; then restart this replica."
        )


def _require_at_least(config: Configurable.Config, name: str, least: int) -> None:
    value = getattr(config, name)
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}.")


def _lighthouse_address(config: TorchftReplicaGroup.Config) -> str:
    address = config.lighthouse_address or os.environ.get("TORCHFT_LIGHTHOUSE")
    if address is None:
        raise ValueError(
            "The address of the lighthouse must be set, got None. Start torchft_lighthouse, and set "
            "lighthouse_address or the environment variable TORCHFT_LIGHTHOUSE to http://host:port."
        )
    return address


def _build_process_group(config: TorchftReplicaGroup.Config) -> Any:
    from torchft.process_group import ProcessGroupGloo, ProcessGroupNCCL

    timeout = timedelta(milliseconds=config.process_group_timeout_ms)
    if config.process_group == "gloo":
        return ProcessGroupGloo(timeout=timeout)
    if not torch.cuda.is_available():
        raise ValueError('process_group must be "gloo" on a machine without GPUs, got "nccl".')
    return ProcessGroupNCCL(timeout=timeout)
