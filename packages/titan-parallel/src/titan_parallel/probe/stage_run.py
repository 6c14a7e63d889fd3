"""Run a model as a whole, and stage by stage as the ranks of a pipeline would, and compare the outputs.

They are equal unless blocks exchange more than their hidden states: through an attribute, a container or a global.
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
from titan_parallel.probe.cheap_copy import copy_sharing_weights
from titan_parallel.probe.mixing import nearly_equal
from titan_parallel.probe.repeated_blocks import forwards_skipping_repeats, representatives
from titan_parallel.probe.verdict import Verdict, one_line
from titan_parallel.sharding_plan.roles import Roles


class StageRun:
    """A run of a cheap copy as a whole; `verdict` compares the stages with it."""

    def __init__(self, copied: nn.Module, roles: Roles, inputs: Mapping[str, Tensor], cut: StageCut) -> None:
        self._roles, self._inputs, self._ranges, self._cut = roles, inputs, cut.ranges, cut
        self._initial = copied
        self._block_outputs: list[Any] = []
        """The output of each block that ran, None for the others."""
        self._draws = forwards.RandomDraws()
        with self._draws:
            self._hidden_states, self._logits = self._run_whole(inputs)
        if not self._logits.isfinite().all():
            raise ArithmeticError("its output is not finite with synthetic weights")

    def verdict(self) -> Verdict:
        """Compare the output of each stage, for the input it receives, with that of the whole model.

        Each stage starts from the same state, as ranks do. A difference proves nothing where random numbers were drawn.
        """
        self._overwrite_external_state()
        for stage in reversed(self._cut.mine):  # the first stages would replace what _overwrite_external_state left
            try:
                with self._draws:
                    difference = self._difference(stage)
            except ConfigError as error:  # the first training step raises it too, where it applies
                return Verdict(None, str(error))
            if difference and self._draws.seen:
                return Verdict(None, "it draws random numbers")
            if difference:
                first_block = self._roles.named("block")[self._ranges[stage].start]
                return Verdict(False, f"{first_block}, which {difference}")
        return Verdict(True)

    def _overwrite_external_state(self) -> None:
        """Run other tokens, whose values then remain in state that copies share: globals, classes, closures."""
        other = {
            name: tensor if tensor.is_floating_point() or tensor.dim() < 2 else tensor.flip(-1)
            for name, tensor in self._inputs.items()
        }
        try:
            with self._draws:
                self._run_whole(other)
        except Exception:  # third-party code that rejects such inputs
            return

    def _representatives(self, model: nn.Module) -> dict[nn.Module, nn.Module]:
        """Return {block: the first equivalent block}; the blocks at the ends of the compared stages always run."""
        representative = representatives(model, self._roles)
        blocks = list(representative)
        ends = [self._ranges[stage] for stage in self._cut.mine]
        return representative | {blocks[i]: blocks[i] for own in ends for i in (own.start, own.stop - 1)}

    def _difference(self, stage: int) -> str:
        """Return in words how the output of a stage differs from that of the whole model; "" if it is equal."""
        own, is_last = self._ranges[stage], stage == len(self._ranges) - 1
        received = self._hidden_states[own.start - 1].clone() if stage else None  # blocks may add in place
        expected = self._logits if is_last else self._hidden_states[own.stop - 1]
        model = copy_sharing_weights(self._initial)
        stage_model = StageModel.of(model, self._roles, StageModules.of(model, self._roles, self._cut.num_ranks), None)
        representative = self._representatives(model)
        pairs = zip(representative, self._block_outputs, strict=True)
        outputs = {block: output for block, output in pairs if output is not None}
        try:
            with forwards.replaced(forwards_skipping_repeats(representative, outputs)):
                result = StageForward(stage_model, own)(lambda: forwards.logits_of(model(**self._inputs)), received)
        except ConfigError:
            raise
        except Exception as error:  # third-party code
            return f"fails without the blocks of other stages ({one_line(error)})"
        is_same = result is not None and result.shape == expected.shape and nearly_equal(result, expected)
        return "" if is_same else "gives other values when the blocks of other stages do not run"

    def _run_whole(self, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the hidden states after each block, and the logits."""
        model = copy_sharing_weights(self._initial)
        hidden_states: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            return lambda _, __, output: hidden_states.__setitem__(number, stream_in(output).clone())

        blocks = [model.get_submodule(name) for name in self._roles.named("block")]
        handles = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
        representative, outputs = self._representatives(model), dict[nn.Module, Any]()
        try:
            with forwards.replaced(forwards_skipping_repeats(representative, outputs)):
                logits = forwards.logits_of(model(**inputs))
        finally:
            for handle in handles:
                handle.remove()
        if logits is None:
            raise TypeError("it returns no tensor")
        if not self._block_outputs:
            self._block_outputs = [outputs.get(block) for block in representative]
        return [hidden_states[number] for number in range(len(blocks))], logits
