"""Any `nn.Module` on a device mesh, from a table of roles."""

from titan_parallel.activation_checkpoint import ActivationCheckpoint, EveryNthBlock, FullRecompute, SelectiveRecompute
from titan_parallel.batch import Batch, Head, Loss
from titan_parallel.check import CheckReport, check_parallel
from titan_parallel.compile import Compile
from titan_parallel.cross_entropy import cross_entropy
from titan_parallel.dims import ParallelDims
from titan_parallel.fsdp_roles import fsdp_roles
from titan_parallel.launchers import adopt_launcher
from titan_parallel.loss_unit import per_sequence, per_token, sum_over_sequence
from titan_parallel.memory import to_empty
from titan_parallel.mixed_precision import MixedPrecision
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.parallelize import parallelize
from titan_parallel.planning.plan import plan
from titan_parallel.planning.report import Plan
from titan_parallel.runtime import init_distributed, set_collective_timeout, set_determinism

__all__ = [
    "ActivationCheckpoint",
    "Batch",
    "CheckReport",
    "Compile",
    "EveryNthBlock",
    "FullRecompute",
    "Head",
    "Loss",
    "MixedPrecision",
    "ParallelDims",
    "ParallelModel",
    "Plan",
    "SelectiveRecompute",
    "adopt_launcher",
    "check_parallel",
    "cross_entropy",
    "fsdp_roles",
    "init_distributed",
    "parallelize",
    "per_sequence",
    "per_token",
    "plan",
    "set_collective_timeout",
    "set_determinism",
    "sum_over_sequence",
    "to_empty",
]
