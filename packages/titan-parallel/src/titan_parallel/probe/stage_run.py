"""A model run as a whole, and stage by stage as the ranks of a pipeline run it.

Both give the same unless blocks exchange more than their stream: by an attribute, a container or a global.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_config import ConfigError
from torch import Tensor, nn

from titan_parallel.pipeline_parallel.split_points import StageCut
from titan_parallel.pipeline_parallel.stage_forward import StageForward, StageModel
from titan_parallel.pipeline_parallel.stage_modules import StageModules
from titan_parallel.pipeline_parallel.stand_ins import stream_in
from titan_parallel.probe import forwards
from titan_parallel.probe.cheap_copy import sharing_weights
from titan_parallel.probe.mixing import alike
from titan_parallel.probe.repeated_blocks import first_of_kind, skipping
from titan_parallel.probe.verdict import Verdict, one_line
from titan_parallel.sharding_plan.roles import Roles


class StageRun:
    """The copy run as a whole; `verdict` compares the stages."""

    def __init__(self, copied: nn.Module, roles: Roles, inputs: Mapping[str, Tensor], cut: StageCut) -> None:
        self._roles, self._inputs, self._ranges, self._cut = roles, inputs, cut.ranges, cut
        self._untouched = copied
        self._returned: list[Any] = []
        """What each block that ran returned, None for the others."""
        self._draws = forwards.Draws()
        with self._draws:
            self._streams, self._whole = self._run_whole(inputs)
        if not self._whole.isfinite().all():
            raise ArithmeticError("its made-up weights give values that are not finite")

    def verdict(self) -> Verdict:
        """Compare what each stage makes of what it receives with what the whole model made of it.

        Each stage begins from the same state, as ranks do. A difference says nothing where random numbers were drawn.
        """
        self._leave_other_values()
        for stage in reversed(self._cut.mine):  # the first stages would mend what the other tokens left
            try:
                with self._draws:
                    why = self._difference(stage)
            except ConfigError as error:  # the first step says it, where it matters
                return Verdict(None, str(error))
            if why and self._draws.any:
                return Verdict(None, "it draws random numbers")
            if why:
                return Verdict(False, f"{self._roles.named('block')[self._ranges[stage].start]}, which {why}")
        return Verdict(True)

    def _leave_other_values(self) -> None:
        """Run other tokens: what is out of the model's reach (a global, a class, a closure) then holds their values."""
        other = {
            name: tensor if tensor.is_floating_point() or tensor.dim() < 2 else tensor.flip(-1)
            for name, tensor in self._inputs.items()
        }
        try:
            with self._draws:
                self._run_whole(other)
        except Exception:  # third-party code: such inputs make no sense to it
            return

    def _kinds(self, model: nn.Module) -> dict[nn.Module, nn.Module]:
        """Block -> the first block that does the same; the ends of these stages always run."""
        kinds = first_of_kind(model, self._roles)
        blocks = list(kinds)
        ends = [self._ranges[stage] for stage in self._cut.mine]
        return kinds | {blocks[i]: blocks[i] for own in ends for i in (own.start, own.stop - 1)}

    def _difference(self, stage: int) -> str:
        """How a stage differs from the whole; "" if it does not."""
        own, is_last = self._ranges[stage], stage == len(self._ranges) - 1
        received = self._streams[own.start - 1].clone() if stage else None  # blocks may add in place
        expected = self._whole if is_last else self._streams[own.stop - 1]
        model = sharing_weights(self._untouched)
        parts = StageModel.of(model, self._roles, StageModules.of(model, self._roles, self._cut.num_ranks), None)
        kinds = self._kinds(model)
        returned = {block: output for block, output in zip(kinds, self._returned, strict=True) if output is not None}
        try:
            with forwards.replaced(skipping(kinds, returned)):
                result = StageForward(parts, own)(lambda: forwards.logits_of(model(**self._inputs)), received)
        except ConfigError:
            raise
        except Exception as error:  # third-party code
            return f"fails without the blocks of other stages ({one_line(error)})"
        is_same = result is not None and result.shape == expected.shape and alike(result, expected)
        return "" if is_same else "gives other values where the blocks of other stages do not run"

    def _run_whole(self, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """The stream that leaves each block, and the logits."""
        model = sharing_weights(self._untouched)
        streams: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            return lambda _, __, output: streams.__setitem__(number, stream_in(output).clone())

        blocks = [model.get_submodule(name) for name in self._roles.named("block")]
        handles = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
        kinds, returned = self._kinds(model), dict[nn.Module, Any]()
        try:
            with forwards.replaced(skipping(kinds, returned)):
                logits = forwards.logits_of(model(**inputs))
        finally:
            for handle in handles:
                handle.remove()
        if logits is None:
            raise TypeError("it returns no tensor")
        if not self._returned:
            self._returned = [returned.get(block) for block in kinds]
        return [streams[number] for number in range(len(blocks))], logits
