"""Replica groups that come and go, for anyone's training loop."""

from titan_ft.lighthouse import local_lighthouse
from titan_ft.replica_group import TorchftReplicaGroup

__all__ = ["TorchftReplicaGroup", "local_lighthouse"]
