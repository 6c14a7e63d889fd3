"""The random generators of Python, numpy and torch, as a part of a checkpoint."""

from __future__ import annotations

import base64
import logging
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan_trainer.protocols import State

log = logging.getLogger(__name__)


class RandomState:
    """This rank's generators under the rank's number, in JSON values: a checkpoint merges those of all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> State:
        """`{rank: {generator: state}}`."""
        version, words, gauss = random.getstate()
        legacy: dict[str, Any] = np.random.get_state(legacy=False)
        state = {
            "python": [version, list(words), gauss],
            "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
            "torch": to_text(torch.get_rng_state()),
        }
        if self.device.type == "cuda":
            state["cuda"] = to_text(torch.cuda.get_rng_state(self.device))
        return {str(dist.get_rank()): state}

    def load_state_dict(self, state: State) -> None:
        """Restore this rank's generators; a rank the checkpoint does not know keeps those it was seeded with."""
        mine = state.get(str(dist.get_rank()))
        if mine is None:
            log.warning(
                "The checkpoint knows %d ranks, not rank %d: its generators start from the seed.",
                len(state),
                dist.get_rank(),
            )
            return
        version, words, gauss = mine["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(
            {
                **mine["numpy"],
                "state": {**mine["numpy"]["state"], "key": np.array(mine["numpy"]["state"]["key"], np.uint32)},
            }
        )
        torch.set_rng_state(to_tensor(mine["torch"]))
        if self.device.type == "cuda" and "cuda" in mine:
            torch.cuda.set_rng_state(to_tensor(mine["cuda"]), self.device)


def to_text(state: Tensor) -> str:
    """A generator's bytes as base64."""
    return base64.b64encode(state.numpy().tobytes()).decode()


def to_tensor(text: str) -> Tensor:
    """The inverse of `to_text`."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
