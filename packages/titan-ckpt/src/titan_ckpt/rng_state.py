"""The random number generators of a rank as a part of a checkpoint."""

from __future__ import annotations

import base64
import json
import logging
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from titan_ckpt.errors import CheckpointError

logger = logging.getLogger(__name__)


class RandomState:
    """The generators of Python, NumPy, torch on CPU and, if CUDA is initialized, the current GPU, stored per rank.

    Loaded on as many ranks as saved it, every generator continues from its saved state. On another number of ranks
    there is no state to continue from: all generators are seeded from the saved states and the rank, deterministically,
    and a warning is logged.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return `{"ranks": {rank: {generator: text}}}` with the generators of this rank."""
        return {"ranks": {str(_rank()): self._texts()}}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore the generators of this rank, or seed them if the number of ranks or the kind of device changed.

        Raises:
            CheckpointError: if the state is not one of such generators.
        """
        try:
            self._load(state["ranks"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                'The part "random" must contain valid states of random number generators, got '
                f"{type(error).__name__}: {error}. Load another checkpoint."
            ) from error

    def _load(self, ranks: dict[str, dict[str, str]]) -> None:
        if len(ranks) == _world_size() and set(ranks[str(_rank())]) == set(self._texts()):
            self._restore(ranks[str(_rank())])
            return
        logger.warning(
            "The random number generators were saved on %d ranks, or on another kind of device; seeding those of the "
            "current %d ranks from the saved state.",
            len(ranks),
            _world_size(),
        )
        seed = xxhash.xxh3_64_intdigest(json.dumps([ranks, _rank()], sort_keys=True).encode())
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)

    def _texts(self) -> dict[str, str]:
        version, words, gauss = random.getstate()
        _, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
        texts = {
            "python": json.dumps([version, _to_text(np.array(words, np.uint32)), gauss]),
            "numpy": json.dumps([_to_text(np.asarray(keys)), place, has_gauss, cached]),
            "cpu": _to_text(torch.get_rng_state().numpy()),
        }
        if torch.cuda.is_initialized():
            texts["cuda"] = _to_text(torch.cuda.get_rng_state().numpy())
        return texts

    def _restore(self, texts: dict[str, str]) -> None:
        version, words, gauss = json.loads(texts["python"])
        random.setstate((version, tuple(_to_array(words, np.uint32).tolist()), gauss))
        keys, place, has_gauss, cached = json.loads(texts["numpy"])
        np.random.set_state(("MT19937", _to_array(keys, np.uint32), place, has_gauss, cached))
        torch.set_rng_state(torch.from_numpy(_to_array(texts["cpu"], np.uint8)))
        if torch.cuda.is_initialized():
            torch.cuda.set_rng_state(torch.from_numpy(_to_array(texts["cuda"], np.uint8)))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _to_text(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _to_array(text: str, dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
