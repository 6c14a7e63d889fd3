"""The training loop: optimizer, schedule, loss, metrics, validation, profiling."""

from titan_trainer.callbacks import Callback
from titan_trainer.errors import NonFiniteError
from titan_trainer.loss import CrossEntropy
from titan_trainer.main import main
from titan_trainer.metrics import Metrics, Sink, TensorBoard
from titan_trainer.model_state import ModelState
from titan_trainer.mtp_loss import MultiTokenPredictionLoss
from titan_trainer.optimizer import AdamW, Optimizer, ParameterGroup
from titan_trainer.plot import draw_loss_curve
from titan_trainer.profiling import Profiler
from titan_trainer.protocols import Run
from titan_trainer.replica_group import SingleReplica
from titan_trainer.schedule import Schedule, WarmupStableDecay
from titan_trainer.scheduled import ScheduledNumber
from titan_trainer.settings import Comm, Debug, Training
from titan_trainer.trainer import StepResult, Trainer
from titan_trainer.validation import Validator

__all__ = [
    "AdamW",
    "Callback",
    "Comm",
    "CrossEntropy",
    "Debug",
    "Metrics",
    "ModelState",
    "MultiTokenPredictionLoss",
    "NonFiniteError",
    "Optimizer",
    "ParameterGroup",
    "Profiler",
    "Run",
    "Schedule",
    "ScheduledNumber",
    "SingleReplica",
    "Sink",
    "StepResult",
    "TensorBoard",
    "Trainer",
    "Training",
    "Validator",
    "WarmupStableDecay",
    "draw_loss_curve",
    "main",
]
