"""A probe that answers two questions about a model.

Does a part work on each token alone? Context parallel needs it of all but attention cores, sequence parallel of all in
the blocks but regions: a cheap copy gives the same on a few tokens as a whole and in two parts, also on a longer
sequence and in train mode without dropout. Do blocks exchange their stream alone? Pipelines need it: the copy gives the
same as a whole and stage by stage.
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
from titan_parallel.probe.cheap_copy import cheap_copy, let_train, sharing_weights
from titan_parallel.probe.long_sequence import ALWAYS_RUN, affordable_lengths, passed_heads
from titan_parallel.probe.model_inputs import made_up_inputs
from titan_parallel.probe.repeated_blocks import first_of_kind
from titan_parallel.probe.split_run import Blocks, SplitRun, WholeModel
from titan_parallel.probe.stage_run import StageRun
from titan_parallel.probe.verdict import Verdict, one_line
from titan_parallel.sharding_plan.roles import Roles

_LENGTHS = (24, 16, 8, 4)
_FEW_TOKENS = (8, 4)
_DTYPES = (torch.float64, torch.float32)
"""What a copy runs in: the first in which it does."""
_MORE = ({"is_long": True}, {"is_training": True})


@dataclass(frozen=True)
class _Question:
    """What is run on a copy, and what is put in the place of some of its modules."""

    run: Callable[..., SplitRun | StageRun]
    prepare: Callable[[nn.Module], dict[nn.Module, Callable[..., Any]]]
    inputs: Mapping[str, Tensor] | None
    """None: made up of tokens."""
    dims: Mapping[str, int] | None
    lengths: tuple[int, ...] = _LENGTHS
    has_one_row: bool = False


class TokenProbe:
    """A cheap copy of a model, to be asked before the model is changed, or at its first batch."""

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
        """Say whether all but attention cores is token-wise, by a batch, or without one by made-up tokens."""

        def prepare(copied: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
            cores = [copied.get_submodule(name) for name in self._roles.named("attention")]
            if not cores and self._transformers:
                forwards.let_transformers_attend_by_token(copied)
            for core in cores:
                core.build_mask = lambda mask: None  # type: ignore[assignment]
            return dict.fromkeys(cores, forwards.attention_of_tokens)

        return self._ask(_Question(WholeModel, prepare, inputs, dims), *_MORE)

    def sequence(self) -> Verdict:
        """Say whether blocks are token-wise outside regions, by made-up tokens."""
        for num_outputs in (2, 1, 3):

            def prepare(copied: nn.Module, num_outputs: int = num_outputs) -> dict[nn.Module, Callable[..., Any]]:
                for name in self._roles.named("attention"):
                    if self._roles.region_of(name) is not None:
                        copied.get_submodule(name).build_mask = lambda mask: None  # type: ignore[assignment]
                regions = [copied.get_submodule(name) for name in self._roles.named("region")]
                return {region: forwards.region_of_tokens(region, num_outputs) for region in regions}

            verdict = self._ask(_Question(Blocks, prepare, None, None), *_MORE)
            if verdict.proved is not None:
                return verdict
        return verdict

    def stages(
        self,
        cut: StageCut,
        inputs: Mapping[str, Tensor] | None = None,
        dims: Mapping[str, int] | None = None,
    ) -> Verdict:
        """Say whether stages compute what the whole does, by a batch, or by made-up tokens."""

        def run(copied: nn.Module, roles: Roles, given: Mapping[str, Tensor], *_: Any) -> StageRun:
            return StageRun(copied, roles, given, cut)

        question = _Question(run, lambda _: {}, inputs, dims, lengths=_FEW_TOKENS, has_one_row=True)
        return self._ask(question, {"is_training": True})

    def ends_with(self, head: str) -> bool:
        """Say whether the output is what the module `head` returns; False where it could not be found out."""
        return self._failure == "" and any(self._ends_with(head, dtype) for dtype in _DTYPES)

    def _ends_with(self, head: str, dtype: torch.dtype) -> bool:
        copied = sharing_weights(self._copy_in(dtype))
        returned: list[Tensor | None] = []
        module = copied.get_submodule(head)
        handle = module.register_forward_hook(lambda _, __, output: returned.append(forwards.first_tensor(output)))
        try:
            with forwards.leaving_no_trace(dtype):
                logits = (self._logits(copied, length) for length in _LENGTHS)
                output = next((x for x in logits if x is not None), None)
        finally:
            handle.remove()
        last = returned[-1] if returned else None
        return output is not None and last is not None and output.shape == last.shape and bool((output == last).all())

    def _logits(self, copied: nn.Module, length: int) -> Tensor | None:
        """What the copy makes of made-up tokens; None where it does not run."""
        inputs = made_up_inputs(copied, self._roles, length)
        try:
            return None if inputs is None else forwards.logits_of(copied(**inputs))
        except Exception:  # third-party code: another length may do
            return None

    def _copied(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        with forwards.leaving_no_trace(dtype):
            return cheap_copy(model, self._projections)

    def _copy_in(self, dtype: torch.dtype) -> nn.Module:
        """That of another dtype is made of the first, since the model may have been changed."""
        if dtype not in self._copies:
            self._copies[dtype] = self._copied(self._copies[torch.float64], dtype)
        return self._copies[dtype]

    def _ask(self, question: _Question, *more: dict[str, bool]) -> Verdict:
        """The answer of a run on a few tokens in eval mode; where that proves it, `more` runs may disprove it."""
        if self._failure:
            return Verdict(None, self._failure)
        for dtype in _DTYPES:
            verdict = self._ask_in(dtype, question)
            if verdict.proved is not None:
                break
        for kind in more if verdict.proved else ():
            other = self._ask_in(dtype, question, **kind)
            if other.proved is False:
                return other
        return verdict

    def _ask_in(
        self, dtype: torch.dtype, question: _Question, *, is_long: bool = False, is_training: bool = False
    ) -> Verdict:
        copied = sharing_weights(self._copy_in(dtype))  # what is prepared for one question is not there for another
        if is_training:
            let_train(copied)
        why = f"nothing is known of the inputs of {self._model_name}"
        with forwards.leaving_no_trace(dtype):
            try:
                stand_ins = question.prepare(copied)
            except Exception as error:  # third-party code
                return Verdict(None, one_line(error))
            lengths: Iterable[int] = question.lengths
            kinds = None
            if is_long:
                kinds = first_of_kind(copied, self._roles, ALWAYS_RUN)
                lengths, stand_ins = affordable_lengths(copied, kinds), passed_heads(copied, self._roles) | stand_ins
            for length in _available(lengths, question.inputs, question.dims or {}):
                given = self._inputs(copied, question, length, dtype)
                if given is None:
                    return Verdict(None, why)
                if is_long or question.has_one_row:
                    given = {name: tensor[:1] for name, tensor in given.items()}
                dims = question.dims
                sequence_dims = dims if dims is not None else {n: 1 for n in given if n != "attention_mask"}
                try:
                    with forwards.replaced(stand_ins):
                        asked = question.run(copied, self._roles, given, sequence_dims, length, set(stand_ins), kinds)
                except Exception as error:  # third-party code
                    why = f"a copy of it does not run ({one_line(error)})"
                    continue
                with forwards.replaced(stand_ins):
                    return asked.verdict()
        return Verdict(None, why)

    def _inputs(
        self, copied: nn.Module, question: _Question, length: int, dtype: torch.dtype
    ) -> dict[str, Tensor] | None:
        if question.inputs is None:
            return made_up_inputs(copied, self._roles, length)
        return _cut(question.inputs, question.dims or {}, length, dtype)


def _available(lengths: Iterable[int], inputs: Mapping[str, Tensor] | None, dims: Mapping[str, int]) -> list[int]:
    """Numbers of tokens to try, longest first, as far as a batch has as many."""
    sizes = [tensor.size(dims[name]) for name, tensor in (inputs or {}).items() if name in dims]
    longest = min(sizes, default=max(lengths, default=0))
    return sorted({min(length, longest) for length in lengths}, reverse=True)


def _cut(inputs: Mapping[str, Tensor], dims: Mapping[str, int], length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The first tokens of the first row of a batch, floating-point numbers in `dtype`."""
    rows = {name: tensor[:1].cpu() for name, tensor in inputs.items()}
    return {
        name: (tensor.narrow(dims[name], 0, length) if name in dims else tensor).to(
            dtype if tensor.is_floating_point() else tensor.dtype
        )
        for name, tensor in rows.items()
    }
