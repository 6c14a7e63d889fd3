"""Any `nn.Module` on a device mesh, from a table of roles."""

from titan_parallel.check import CheckReport, check_parallel
from titan_parallel.data_parallel.mixed_precision import MixedPrecision
from titan_parallel.memory.activation_checkpoint import (
    ActivationCheckpoint,
    FullActivationCheckpoint,
    PeriodicActivationCheckpoint,
    SelectiveActivationCheckpoint,
)
from titan_parallel.memory.compile import Compile
from titan_parallel.memory.to_empty import to_empty
from titan_parallel.mesh.distributed import init_distributed, set_collective_timeout, set_determinism
from titan_parallel.mesh.launchers import adopt_launcher
from titan_parallel.mesh.parallel_dims import ParallelDims
from titan_parallel.parallel_model import ParallelModel
from titan_parallel.parallelize import parallelize
from titan_parallel.planning.plan import plan
from titan_parallel.planning.report import Plan
from titan_parallel.sharding_plan.roles import RoleSpec, RoleTable
from titan_parallel.sharding_plan.unit_roles import fsdp_roles
from titan_parallel.step.batch import Batch, Head, Loss
from titan_parallel.step.hooks import StepHooks
from titan_parallel.step.loss_unit import per_sequence, per_token, sum_over_sequence
from titan_parallel.tensor_parallel.vocab_parallel_loss import cross_entropy
from titan_parallel.transforms import ParallelBuild, Transform

__all__ = [
    "ActivationCheckpoint",
    "Batch",
    "CheckReport",
    "Compile",
    "FullActivationCheckpoint",
    "Head",
    "Loss",
    "MixedPrecision",
    "ParallelBuild",
    "ParallelDims",
    "ParallelModel",
    "PeriodicActivationCheckpoint",
    "Plan",
    "RoleSpec",
    "RoleTable",
    "SelectiveActivationCheckpoint",
    "StepHooks",
    "Transform",
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
