"""Replicas of a whole training process that train one model together, and may die and come back: torchft behind five methods."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from titan_config import Configurable, ConfigError
from torch import Tensor

from titan_ft.network import address_towards, in_url
from titan_ft.snapshot import Snapshot, State, meshes_of, put_together, take

log = logging.getLogger(__name__)


class TorchftReplicaGroup(Configurable):
    """This rank's part in a group of replicas, each of them one or more ranks, that meet at a torchft lighthouse.

    Build it on every rank, after `torch.distributed` if the replica has more than one. A step is

    >>> index, num_replicas = group.begin_step()    # doctest: +SKIP
    >>> ...                                         # this replica's share of the batch; group.reduce_(gradient) on each gradient
    >>> if group.commit():                          # doctest: +SKIP
    ...     optimizer.step()

    Rank r of a replica exchanges with rank r of the others: shard inside a replica as you like, alike in all of them.
    """

    class Config(Configurable.Config):
        replica_id: int
        """Of this replica among all that may exist; the same after a restart."""
        min_replica_size: int = 1
        """A step that fewer replicas take part in does not commit."""
        process_group: Literal["gloo", "nccl"] = "gloo"
        """What carries the sums."""
        process_group_timeout_ms: int = 10_000
        """How long a sum waits for the other replicas before the step fails. A newcomer that heals keeps them waiting too."""
        quorum_timeout_ms: int = 60_000
        """How long `begin_step` waits for enough replicas to be ready."""
        heal_timeout_ms: int = 600_000
        """How long moving the state to a newcomer may take."""
        max_failed_steps: int = 20
        """So many failed steps in a row are taken as lost time; one more ends this replica."""
        lighthouse_address: str | None = None
        """Where the replicas meet: `http://host:port`. None: what the environment's TORCHFT_LIGHTHOUSE says."""

        def validate(self) -> None:
            for name, least in (("replica_id", 0), ("min_replica_size", 1), ("max_failed_steps", 0)):
                _require_at_least(self, name, least)
            for name in ("process_group_timeout_ms", "quorum_timeout_ms", "heal_timeout_ms"):
                _require_at_least(self, name, 1)

    def __init__(self, config: Config) -> None:
        from torchft.manager import Manager

        from titan_ft.transport import SnapshotTransport

        self._config = config
        lighthouse = _lighthouse_address(config)
        host = address_towards(lighthouse)
        self._group = _process_group(config)
        self._store, store_port = _open_store(host)
        heal_timeout = timedelta(milliseconds=config.heal_timeout_ms)
        try:
            self._manager = Manager(
                pg=self._group,
                load_state_dict=self._receive,
                state_dict=self._send,
                min_replica_size=config.min_replica_size,
                use_async_quorum=False,
                timeout=heal_timeout,
                quorum_timeout=timedelta(milliseconds=config.quorum_timeout_ms),
                connect_timeout=timedelta(milliseconds=config.quorum_timeout_ms),
                rank=_rank(),
                world_size=_world_size(),
                store_addr=self._store.host,
                store_port=store_port,
                lighthouse_addr=lighthouse,
                replica_id=f"replica_{config.replica_id}",
                hostname=in_url(host),
                checkpoint_transport=SnapshotTransport(host, heal_timeout),
            )
        except (RuntimeError, TimeoutError) as error:
            raise _unreachable(lighthouse, config) from error
        self._lighthouse = lighthouse
        self._state_dict: Callable[[], State] | None = None
        self._load_state_dict: Callable[[State], None] | None = None
        self._received: Snapshot | None = None
        self._failed_steps = 0

    def register_state(
        self, state_dict: Callable[[], State], load_state_dict: Callable[[State], None], step: int = 0
    ) -> None:
        """State what heals a newcomer; call it once, before the first step.

        `state_dict()` is a nested dictionary of tensors, of this rank's part of `DTensor`s, and of JSON values. It is called
        while `begin_step` waits, in another thread, and copied at once. `load_state_dict` gets the like, with the `DTensor`s
        on this replica's own mesh. `step` says how many steps this replica has behind it (those of the checkpoint it went on
        from): in a group that starts anew, whoever is behind heals from whoever is furthest.
        """
        self._state_dict, self._load_state_dict = state_dict, load_state_dict
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    def begin_step(self) -> tuple[int, int]:
        """Fix who takes part in this step, and heal this replica if it is behind; return (my index, how many).

        Raises RuntimeError if not enough replicas were ready in `quorum_timeout_ms`; this replica is to be started again then.
        """
        if self._load_state_dict is None:
            raise RuntimeError(
                "Got begin_step() before register_state(). A replica that joins must be given the weights of the others. "
                "Register the functions that return and take this replica's state."
            )
        try:
            self._manager.start_quorum()
        except (RuntimeError, TimeoutError) as error:
            raise _unreachable(self._lighthouse, self._config) from error
        if self._received is not None:
            snapshot, self._received = self._received, None
            self._load_state_dict(put_together(snapshot, meshes_of(self._current_state())))
        return self._manager.participating_rank(), self._manager.num_participants()

    @torch.no_grad()
    def reduce_(self, tensor: Tensor) -> None:
        """Sum `tensor` over the replicas of this step, in place: any dtype that the process group adds, int64 included.

        Every replica must reduce the same tensors in the same order; an FSDP all-reduce hook does. Never raises for a
        replica that is lost: `tensor` then holds nothing of meaning, this and all later sums of the step come back at once,
        and `commit()` is False.
        """
        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()

    def commit(self) -> bool:
        """Return whether the weights may change: every rank of every replica got here with all of its sums.

        False: drop the gradients and give the batch back; the next `begin_step` is without whoever was lost. Raises
        RuntimeError after more than `max_failed_steps` in a row.
        """
        self.reduce_(torch.ones(1, device="cpu" if self._config.process_group == "gloo" else "cuda"))
        failure = self._manager.errored()
        if failure is not None:
            self._group.abort()  # who waits for this rank in a sum need not wait for the timeout
        if self._manager.should_commit():
            self._failed_steps = 0
            return True
        self._failed_steps += 1
        cause = failure.original_exception if failure is not None else None
        log.warning("A step was given back, %d in a row: %s", self._failed_steps, cause or "another rank failed")
        if self._failed_steps > self._config.max_failed_steps:
            raise RuntimeError(
                f"Got {self._failed_steps} failed steps in a row. A group of replicas loses a step or two when one of them dies, "
                "never this many. Look at the cause above, and at the timeouts; then start this replica again."
            ) from cause
        return False

    def close(self) -> None:
        """Leave the group. The others go on."""
        self._manager.shutdown()
        self._group.abort(errored=False)

    def _current_state(self) -> State:
        assert self._state_dict is not None
        return self._state_dict()

    def _send(self) -> Snapshot:
        return take(self._current_state())

    def _receive(self, snapshot: Snapshot) -> None:
        self._received = snapshot


def _require_at_least(config: Configurable.Config, name: str, least: int) -> None:
    value = getattr(config, name)
    if value < least:
        raise ConfigError(f"Got {name} {value}. It must be {least} or more. Set it to {least} or more.")


def _lighthouse_address(config: TorchftReplicaGroup.Config) -> str:
    address = config.lighthouse_address or os.environ.get("TORCHFT_LIGHTHOUSE")
    if address is None:
        raise ValueError(
            "Got no address of a lighthouse. The replicas meet there. Start torchft_lighthouse, and set lighthouse_address or the "
            "environment's TORCHFT_LIGHTHOUSE to http://host:port."
        )
    return address


def _unreachable(lighthouse: str, config: TorchftReplicaGroup.Config) -> RuntimeError:
    return RuntimeError(
        f"Got no answer from the lighthouse at {lighthouse} in {config.quorum_timeout_ms} ms. A step starts when the lighthouse has "
        "counted enough replicas. See that it runs, that it can be reached from here, and that its min_replicas are alive."
    )


def _process_group(config: TorchftReplicaGroup.Config) -> Any:
    from torchft.process_group import ProcessGroupGloo, ProcessGroupNCCL

    if config.process_group == "gloo":
        return ProcessGroupGloo(timeout=timedelta(milliseconds=config.process_group_timeout_ms))
    if not torch.cuda.is_available():
        raise ValueError(
            "Got process_group nccl without a GPU. NCCL sums tensors on GPUs only. Set process_group to gloo."
        )
    return ProcessGroupNCCL(timeout=timedelta(milliseconds=config.process_group_timeout_ms))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _open_store(host: str) -> tuple[dist.TCPStore, int]:
    """Open the store in which this replica's ranks find each other and the ranks of other replicas find them.

    It is the replica's own: one that torchrun keeps across restarts would remember the addresses of the dead.
    """
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if _rank() == 0 else None
    address = [(store.host, store.port) if store is not None else None]
    if _world_size() > 1:
        dist.broadcast_object_list(address, src=0)
    assert address[0] is not None
    host, port = address[0]
    return store or dist.TCPStore(host, port, is_master=False, wait_for_workers=False), port
