"""A probe of a model on a few tokens, before it is parallelized.

It tests two properties on a cheap copy:

- Token-wise: a module computes each token without the others. Context parallel requires this of everything but
  attention cores, sequence parallel of everything in blocks outside regions. The copy must give equal outputs for a
  sequence as a whole and in two parts, also for a longer sequence and in train mode without dropout.
- Separable stages: blocks exchange only their hidden states, which pipeline parallel requires. The copy must give equal
  outputs as a whole and stage by stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel._transformers import is_transformers_model
from titan_parallel.pipeline_parallel.split_points import StageCut
from titan_parallel.probe import forwards
from titan_parallel.probe.cheap_copy import cheap_copy, copy_sharing_weights, set_train_mode_without_dropout
from titan_parallel.probe.long_sequence import ALWAYS_RUN, affordable_lengths, skipped_heads
from titan_parallel.probe.model_inputs import synthetic_inputs
from titan_parallel.probe.repeated_blocks import representatives
from titan_parallel.probe.split_run import Blocks, SplitRun, WholeModel
from titan_parallel.probe.stage_run import StageRun
from titan_parallel.probe.verdict import Verdict, one_line
from titan_parallel.sharding_plan.roles import Roles

_LENGTHS = (24, 16, 8, 4)
_STAGE_LENGTHS = (8, 4)
_DTYPES = (torch.float64, torch.float32)
"""Dtypes of a run, in order of preference: the first in which the copy runs is used."""
_FURTHER_RUNS = ({"is_long": True}, {"is_training": True})


@dataclass(frozen=True)
class _Question:
    """One property to test: the run to make on a copy, and the stand-ins for some of its modules."""

    run: Callable[..., SplitRun | StageRun]
    prepare: Callable[[nn.Module], dict[nn.Module, Callable[..., Any]]]
    inputs: Mapping[str, Tensor] | None
    """None: synthetic token ids."""
    dims: Mapping[str, int] | None
    """Input -> its sequence dim."""
    lengths: tuple[int, ...] = _LENGTHS
    one_sequence: bool = False


class ModelProbe:
    """Tests properties of a model on a cheap copy, before the model is changed or at its first batch."""

    def __init__(self, model: nn.Module, roles: Roles) -> None:
        self._model_name = type(model).__name__
        self._roles = roles
        self._transformers = is_transformers_model(model)
        self._copies: dict[torch.dtype, nn.Module] = {}
        self._failure = ""
        self._projections = [name for role in ("colwise", "rowwise", "head") for name in roles.named(role)]
        try:
            self._copies[torch.float64] = self._copied(model, torch.float64)
        except Exception as error:  # third-party code: what cannot be copied cannot be probed
            self._failure = f"the model cannot be copied ({one_line(error)})"

    def context(self, inputs: Mapping[str, Tensor] | None = None, dims: Mapping[str, int] | None = None) -> Verdict:
        """Return whether everything but attention cores is token-wise.

        `inputs` are those of a batch, with their sequence `dims`; None: synthetic token ids.
        """

        def prepare(copied: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
            cores = [copied.get_submodule(name) for name in self._roles.named("attention")]
            if not cores and self._transformers:
                forwards.use_tokenwise_attention(copied)
            for core in cores:
                core.build_mask = lambda mask: None  # type: ignore[assignment]
            return dict.fromkeys(cores, forwards.tokenwise_attention)

        return self._ask(_Question(WholeModel, prepare, inputs, dims), *_FURTHER_RUNS)

    def sequence(self) -> Verdict:
        """Return whether blocks are token-wise outside regions, for synthetic token ids."""
        for num_outputs in (2, 1, 3):

            def prepare(copied: nn.Module, num_outputs: int = num_outputs) -> dict[nn.Module, Callable[..., Any]]:
                for name in self._roles.named("attention"):
                    if self._roles.region_of(name) is not None:
                        copied.get_submodule(name).build_mask = lambda mask: None  # type: ignore[assignment]
                regions = [copied.get_submodule(name) for name in self._roles.named("region")]
                return {region: forwards.tokenwise_region(region, num_outputs) for region in regions}

            verdict = self._ask(_Question(Blocks, prepare, None, None), *_FURTHER_RUNS)
            if verdict.proved is not None:
                return verdict
        return verdict

    def stages(
        self,
        cut: StageCut,
        inputs: Mapping[str, Tensor] | None = None,
        dims: Mapping[str, int] | None = None,
    ) -> Verdict:
        """Return whether the stages together compute the output of the whole model.

        `inputs` are those of a batch, with their sequence `dims`; None: synthetic token ids.
        """

        def run(copied: nn.Module, roles: Roles, given: Mapping[str, Tensor], *_: Any) -> StageRun:
            return StageRun(copied, roles, given, cut)

        question = _Question(run, lambda _: {}, inputs, dims, lengths=_STAGE_LENGTHS, one_sequence=True)
        return self._ask(question, {"is_training": True})

    def ends_with(self, head: str) -> bool:
        """Return whether the model's output is that of the module `head`; False if the probe could not tell."""
        return self._failure == "" and any(self._ends_with(head, dtype) for dtype in _DTYPES)

    def _ends_with(self, head: str, dtype: torch.dtype) -> bool:
        copied = copy_sharing_weights(self._copy_in(dtype))
        head_outputs: list[Tensor | None] = []
        module = copied.get_submodule(head)
        handle = module.register_forward_hook(lambda _, __, output: head_outputs.append(forwards.first_tensor(output)))
        try:
            with forwards.isolated(dtype):
                logits = (self._logits(copied, length) for length in _LENGTHS)
                output = next((x for x in logits if x is not None), None)
        finally:
            handle.remove()
        last = head_outputs[-1] if head_outputs else None
        return output is not None and last is not None and output.shape == last.shape and bool((output == last).all())

    def _logits(self, copied: nn.Module, length: int) -> Tensor | None:
        """Return the logits of the copy for synthetic token ids; None where it does not run."""
        inputs = synthetic_inputs(copied, self._roles, length)
        try:
            return None if inputs is None else forwards.logits_of(copied(**inputs))
        except Exception:  # third-party code: it may run on another length
            return None

    def _copied(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        with forwards.isolated(dtype):
            return cheap_copy(model, self._projections)

    def _copy_in(self, dtype: torch.dtype) -> nn.Module:
        """Return the copy in `dtype`, made from the first copy, as the model may have been changed since."""
        if dtype not in self._copies:
            self._copies[dtype] = self._copied(self._copies[torch.float64], dtype)
        return self._copies[dtype]

    def _ask(self, question: _Question, *further_runs: dict[str, bool]) -> Verdict:
        """Return the verdict of a run on a few tokens in eval mode; if it is True, `further_runs` may make it False."""
        if self._failure:
            return Verdict(None, self._failure)
        for dtype in _DTYPES:
            verdict = self._ask_in(dtype, question)
            if verdict.proved is not None:
                break
        for kind in further_runs if verdict.proved else ():
            other = self._ask_in(dtype, question, **kind)
            if other.proved is False:
                return other
        return verdict

    def _ask_in(
        self, dtype: torch.dtype, question: _Question, *, is_long: bool = False, is_training: bool = False
    ) -> Verdict:
        copied = copy_sharing_weights(self._copy_in(dtype))  # a question must not see the preparations of another
        if is_training:
            set_train_mode_without_dropout(copied)
        reason = f"the inputs of {self._model_name} are unknown"
        with forwards.isolated(dtype):
            try:
                stand_ins = question.prepare(copied)
            except Exception as error:  # third-party code
                return Verdict(None, one_line(error))
            lengths: Iterable[int] = question.lengths
            blocks_to_run = None
            if is_long:
                blocks_to_run = representatives(copied, self._roles, ALWAYS_RUN)
                lengths = affordable_lengths(copied, blocks_to_run)
                stand_ins = skipped_heads(copied, self._roles) | stand_ins
            for length in _available(lengths, question.inputs, question.dims or {}):
                given = self._inputs(copied, question, length, dtype)
                if given is None:
                    return Verdict(None, reason)
                if is_long or question.one_sequence:
                    given = {name: tensor[:1] for name, tensor in given.items()}
                dims = question.dims
                sequence_dims = dims if dims is not None else {n: 1 for n in given if n != "attention_mask"}
                arguments = (given, sequence_dims, length, set(stand_ins), blocks_to_run)
                try:
                    with forwards.replaced(stand_ins):
                        run = question.run(copied, self._roles, *arguments)
                except Exception as error:  # third-party code
                    reason = f"a copy of the model does not run ({one_line(error)})"
                    continue
                with forwards.replaced(stand_ins):
                    return run.verdict()
        return Verdict(None, reason)

    def _inputs(
        self, copied: nn.Module, question: _Question, length: int, dtype: torch.dtype
    ) -> dict[str, Tensor] | None:
        if question.inputs is None:
            return synthetic_inputs(copied, self._roles, length)
        return _cut(question.inputs, question.dims or {}, length, dtype)


def _available(lengths: Iterable[int], inputs: Mapping[str, Tensor] | None, dims: Mapping[str, int]) -> list[int]:
    """Return the numbers of tokens to try, longest first, none longer than the sequences of the batch."""
    sizes = [tensor.size(dims[name]) for name, tensor in (inputs or {}).items() if name in dims]
    longest = min(sizes, default=max(lengths, default=0))
    return sorted({min(length, longest) for length in lengths}, reverse=True)


def _cut(inputs: Mapping[str, Tensor], dims: Mapping[str, int], length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the first `length` tokens of the first sequence of a batch, with floating-point tensors in `dtype`."""
    first = {name: tensor[:1].cpu() for name, tensor in inputs.items()}
    return {
        name: (tensor.narrow(dims[name], 0, length) if name in dims else tensor).to(
            dtype if tensor.is_floating_point() else tensor.dtype
        )
        for name, tensor in first.items()
    }
