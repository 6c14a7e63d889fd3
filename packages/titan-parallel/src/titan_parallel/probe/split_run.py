"""Run a model on a whole sequence, and on its two parts as two ranks would, and compare the outputs."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel.pipeline_parallel.stand_ins import StreamArgument
from titan_parallel.probe import forwards
from titan_parallel.probe.mixing import NamedModules, find_mixing_module, nearly_equal
from titan_parallel.probe.repeated_blocks import forwards_skipping_repeats, representatives
from titan_parallel.probe.verdict import Verdict, one_line
from titan_parallel.sharding_plan.roles import Roles, inside


class SplitRun(abc.ABC):
    """A run of a cheap copy on the whole sequence, to be compared with runs on its parts."""

    def __init__(
        self,
        copied: nn.Module,
        roles: Roles,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        length: int,
        stand_ins: set[nn.Module],
        blocks_to_run: Mapping[nn.Module, nn.Module] | None = None,
    ) -> None:
        """Run the copy on the whole sequence of `length` tokens.

        `dims`: input -> its sequence dim. `stand_ins`: modules whose forward is replaced, which may mix tokens.
        `blocks_to_run`: block -> the first equivalent block, which alone runs; None: found by `representatives`.
        """
        self._copied, self._roles, self._inputs, self._dims, self._length = copied, roles, inputs, dims, length
        self._stand_ins = stand_ins
        self._representatives = blocks_to_run if blocks_to_run is not None else representatives(copied, roles)
        self._draws = forwards.RandomDraws()
        with forwards.recorded_calls(copied) as self._calls, self._draws:
            self._whole = self._output(slice(0, length))
        if not self._whole.isfinite().all():
            raise ArithmeticError("its output is not finite with synthetic weights")

    def verdict(self) -> Verdict:
        """Compare the outputs of the parts with that of the whole.

        A difference proves nothing where random numbers were drawn, or where one run changes the next.
        """
        verdict = self._compare()
        if verdict.proved is False and self._draws.seen:
            return Verdict(None, "it draws random numbers")
        if verdict.proved is False and not self._is_repeatable():
            return Verdict(None, "its output differs from run to run")
        return verdict

    def _is_repeatable(self) -> bool:
        try:
            return nearly_equal(self._output(slice(0, self._length)), self._whole)
        except Exception:  # third-party code that cannot be run again
            return True

    def _compare(self) -> Verdict:
        cut = max(1, self._length * 3 // 8)
        try:
            with self._draws:
                parts = [self._output(part) for part in (slice(0, cut), slice(cut, self._length))]
        except Exception as error:  # third-party code that depends on the number of tokens
            return Verdict(
                False, self._mixing_module or f"{self._subject} fail on a part of a sequence ({one_line(error)})"
            )
        dim = next((d for d in range(self._whole.dim()) if self._is_sequence(d, parts)), None)
        if dim is None:
            reason = self._mixing_module or f"the output of {self._subject} has no sequence dim"
            return Verdict(None if self._copied.training else False, reason)
        if nearly_equal(torch.cat(parts, dim), self._whole):
            return Verdict(True)
        return Verdict(False, self._mixing_module or f"{self._subject} mix tokens")

    @property
    def _mixing_module(self) -> str:
        """A description of the module that mixes tokens; "" if none is found."""
        blocks = self._roles.named("block")
        opened = [
            name for name, _ in self._copied.named_modules() if any(inside(b, name) and b != name for b in blocks)
        ]
        return find_mixing_module(self._modules(), self._calls, self._stand_ins, opened, self._length)

    _subject = "the modules of the model"

    def _is_sequence(self, dim: int, parts: list[Tensor]) -> bool:
        sizes = [part.size(dim) for part in parts if part.dim() > dim]
        return len(set(sizes)) == 2 and sum(sizes) == self._whole.size(dim) == self._length

    @abc.abstractmethod
    def _output(self, part: slice) -> Tensor:
        """Return the output of the copy for a part of the sequence."""

    def _modules(self) -> NamedModules:
        return list(self._copied.named_children())


class WholeModel(SplitRun):
    """From the inputs to the logits: context parallel."""

    def _output(self, part: slice) -> Tensor:
        inputs = {
            name: tensor.narrow(self._dims[name], part.start, part.stop - part.start) if name in self._dims else tensor
            for name, tensor in self._inputs.items()
        }
        with forwards.replaced(forwards_skipping_repeats(self._representatives)):
            output = self._copied(**inputs)
        tensor = forwards.logits_of(output)
        if tensor is None:
            raise TypeError("it returns no tensor")
        return tensor


class Blocks(SplitRun):
    """From the input of the first block to the output of the last: sequence parallel."""

    _subject = "the blocks"
    _last_output: Tensor | None = None

    def _output(self, part: slice) -> Tensor:
        names = self._roles.named("block")
        first, last = self._copied.get_submodule(names[0]), self._copied.get_submodule(names[-1])
        replaced = forwards_skipping_repeats(self._representatives)
        between = [n for n in self._roles.named("embedding") if self._roles.options(n).get("between_blocks")]
        replaced |= {
            module: _part_of_output(module.forward, part) for module in (self._copied.get_submodule(n) for n in between)
        }

        hidden = StreamArgument(first)
        self._last_output = None

        def split(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return hidden.replaced(hidden.of(args, kwargs)[..., part, :], args, kwargs)

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            self._last_output = forwards.first_tensor(output)
            raise forwards.StopForward

        handles = [first.register_forward_pre_hook(split, with_kwargs=True), last.register_forward_hook(stop)]
        try:
            with forwards.replaced(replaced):
                self._copied(**self._inputs)
        except forwards.StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if self._last_output is None:
            raise TypeError("its blocks return no tensor")
        return self._last_output

    def _is_sequence(self, dim: int, parts: list[Tensor]) -> bool:
        return dim == self._whole.dim() - 2 and super()._is_sequence(dim, parts)

    def _modules(self) -> NamedModules:
        return [(name, self._copied.get_submodule(name)) for name in self._roles.named("block")]


def _part_of_output(forward: Callable[..., Any], part: slice) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*args, **kwargs)[..., part, :]
