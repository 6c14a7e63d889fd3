"""A model run as a whole, and stage by stage as the ranks of a pipeline run it.

Both give the same unless blocks exchange more than their stream: by an attribute, a container or a global.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.probe import forwards
from titan_parallel.probe.cheap_copy import sharing_weights
from titan_parallel.probe.mixing import alike
from titan_parallel.probe.repeated_blocks import first_of_kind, skipping
from titan_parallel.probe.verdict import Verdict, one_line
from titan_parallel.roles import Roles
from titan_parallel.stage_forward import StageForward, StageModel
from titan_parallel.stage_pieces import StageModules
from titan_parallel.stand_in import stream_in


class StageRun:
    """The copy run as a whole; `verdict` compares the stages."""

    def __init__(
        self, copied: nn.Module, roles: Roles, inputs: Mapping[str, Tensor], ranges: Sequence[range], num_ranks: int
    ) -> None:
        """`ranges` are the numbers of the blocks of each stage."""
        self._roles, self._inputs, self._ranges, self._num_ranks = roles, inputs, ranges, num_ranks
        self._untouched = sharing_weights(copied)
        self._first_of_kind = self._kinds(copied)
        self._returned: dict[nn.Module, Any] = {}
        self._streams, self._whole = self._run_whole(copied, self._first_of_kind, self._returned)
        if not self._whole.isfinite().all():
            raise ArithmeticError("its made-up weights give values that are not finite")

    def verdict(self) -> Verdict:
        """Compare what each stage makes of what it receives with what the whole model made of it.

        Raises ConfigError for a model that its stages refuse.
        """
        model = sharing_weights(self._untouched)
        parts = StageModel.of(model, self._roles, StageModules.of(model, self._roles, self._num_ranks), None)
        kinds = self._kinds(model)
        returned = {
            first: self._returned[own]
            for first, own in zip(kinds.values(), self._first_of_kind.values(), strict=True)
            if own in self._returned
        }
        with forwards.replaced(skipping(kinds, returned)):
            for stage in reversed(range(len(self._ranges))):  # so that none finds what an earlier one left
                if why := self._difference(model, parts, stage):
                    return self._refused(f"{parts.block_names[self._ranges[stage].start]}, which {why}")
        return Verdict(True)

    def _kinds(self, model: nn.Module) -> dict[nn.Module, nn.Module]:
        """Block -> the first block that does the same; the ends of stages always run."""
        kinds = first_of_kind(model, self._roles)
        blocks = list(kinds)
        return kinds | {blocks[i]: blocks[i] for own in self._ranges for i in (own.start, own.stop - 1)}

    def _difference(self, model: nn.Module, parts: StageModel, stage: int) -> str:
        """How a stage differs from the whole; "" if it does not."""
        own, is_last = self._ranges[stage], stage == len(self._ranges) - 1
        received = self._streams[own.start - 1].clone() if stage else None  # blocks may add in place
        expected = self._whole if is_last else self._streams[own.stop - 1]
        try:
            result = StageForward(parts, own)(lambda: forwards.logits_of(model(**self._inputs)), received)
        except ConfigError:
            raise
        except Exception as error:  # third-party code
            return f"fails without the blocks of other stages ({one_line(error)})"
        is_same = result is not None and result.shape == expected.shape and alike(result, expected)
        return "" if is_same else "gives other values where the blocks of other stages do not run"

    def _run_whole(
        self, model: nn.Module, kinds: Mapping[nn.Module, nn.Module], returned: dict[nn.Module, Any]
    ) -> tuple[list[Tensor], Tensor]:
        """The stream that leaves each block, and the logits."""
        streams: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            return lambda _, __, output: streams.__setitem__(number, stream_in(output).clone())

        blocks = [model.get_submodule(name) for name in self._roles.named("block")]
        handles = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
        try:
            with forwards.replaced(skipping(kinds, returned)):
                logits = forwards.logits_of(model(**self._inputs))
        finally:
            for handle in handles:
                handle.remove()
        if logits is None:
            raise TypeError("it returns no tensor")
        return [streams[number] for number in range(len(blocks))], logits

    def _refused(self, why: str) -> Verdict:
        """A difference, unless the model gives other values each time."""
        torch.manual_seed(1)
        model = sharing_weights(self._untouched)
        try:
            streams, whole = self._run_whole(model, self._kinds(model), {})
        except Exception:  # third-party code that does not run twice
            return Verdict(False, why)
        if all(map(alike, [*streams, whole], [*self._streams, self._whole])):
            return Verdict(False, why)
        return Verdict(None, "it gives other values each time it runs")
