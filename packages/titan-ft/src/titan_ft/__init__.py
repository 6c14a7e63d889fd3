"""Fault-tolerant replica groups for custom training loops."""

from titan_ft.lighthouse import local_lighthouse
from titan_ft.replica_group import TorchftReplicaGroup

__all__ = ["TorchftReplicaGroup", "local_lighthouse"]
