"""A model run on a sequence, once as a whole and once in two parts, as two ranks would run it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel.pipeline_parallel.stand_ins import StreamArgument
from titan_parallel.probe import forwards
from titan_parallel.probe.mixing import NamedModules, alike, part_that_mixes
from titan_parallel.probe.repeated_blocks import first_of_kind, skipping
from titan_parallel.probe.verdict import Verdict, one_line
from titan_parallel.sharding_plan.roles import Roles, inside


class SplitRun(abc.ABC):
    """The copy run on the whole sequence, and on parts of it."""

    def __init__(
        self,
        copied: nn.Module,
        roles: Roles,
        inputs: Mapping[str, Tensor],
        dims: Mapping[str, int],
        length: int,
        stand_ins: set[nn.Module],
        kinds: Mapping[nn.Module, nn.Module] | None = None,
    ) -> None:
        """`kinds`: block -> the first block that does the same, which alone runs."""
        self._copied, self._roles, self._inputs, self._dims, self._length = copied, roles, inputs, dims, length
        self._stand_ins = stand_ins
        self._first_of_kind = kinds if kinds is not None else first_of_kind(copied, roles)
        self._draws = forwards.Draws()
        with forwards.watched(copied) as self._calls, self._draws:
            self._whole = self._output(slice(0, length))
        if not self._whole.isfinite().all():
            raise ArithmeticError("its made-up weights give values that are not finite")

    def verdict(self) -> Verdict:
        """Compare the parts with the whole.

        A difference says nothing where random numbers were drawn, or where a run changes the next.
        """
        verdict = self._compared()
        if verdict.proved is False and self._draws.any:
            return Verdict(None, "it draws random numbers")
        if verdict.proved is False and not self._is_repeatable():
            return Verdict(None, "it gives other values each time it runs")
        return verdict

    def _is_repeatable(self) -> bool:
        try:
            return alike(self._output(slice(0, self._length)), self._whole)
        except Exception:  # third-party code that does not run twice
            return True

    def _compared(self) -> Verdict:
        cut = max(1, self._length * 3 // 8)
        try:
            with self._draws:
                parts = [self._output(part) for part in (slice(0, cut), slice(cut, self._length))]
        except Exception as error:  # third-party code: it counts tokens
            return Verdict(False, self._blame or f"{self._where} fail on a part of a sequence ({one_line(error)})")
        dim = next((d for d in range(self._whole.dim()) if self._is_sequence(d, parts)), None)
        if dim is None:
            why = self._blame or f"what {self._where} return has no dim of tokens"
            return Verdict(None if self._copied.training else False, why)
        if alike(torch.cat(parts, dim), self._whole):
            return Verdict(True)
        return Verdict(False, self._blame or f"{self._where} mix tokens")

    @property
    def _blame(self) -> str:
        blocks = self._roles.named("block")
        parts = self._parts()
        opened = [
            name for name, _ in self._copied.named_modules() if any(inside(b, name) and b != name for b in blocks)
        ]
        return part_that_mixes(parts, self._calls, self._stand_ins, opened, self._length)

    _where = "the parts of the model"

    def _is_sequence(self, dim: int, parts: list[Tensor]) -> bool:
        sizes = [part.size(dim) for part in parts if part.dim() > dim]
        return len(set(sizes)) == 2 and sum(sizes) == self._whole.size(dim) == self._length

    @abc.abstractmethod
    def _output(self, part: slice) -> Tensor:
        """Return what the copy makes of a part of the sequence."""

    def _parts(self) -> NamedModules:
        return list(self._copied.named_children())


class WholeModel(SplitRun):
    """From the inputs to the logits: context parallel."""

    def _output(self, part: slice) -> Tensor:
        inputs = {
            name: tensor.narrow(self._dims[name], part.start, part.stop - part.start) if name in self._dims else tensor
            for name, tensor in self._inputs.items()
        }
        with forwards.replaced(skipping(self._first_of_kind)):
            output = self._copied(**inputs)
        tensor = forwards.logits_of(output)
        if tensor is None:
            raise TypeError("it returns no tensor")
        return tensor


class Blocks(SplitRun):
    """From the stream that enters the first block to what leaves the last: sequence parallel."""

    _where = "the blocks"
    _left: Tensor | None = None

    def _output(self, part: slice) -> Tensor:
        names = self._roles.named("block")
        first, last = self._copied.get_submodule(names[0]), self._copied.get_submodule(names[-1])
        changed = skipping(self._first_of_kind)
        between = [n for n in self._roles.named("embedding") if self._roles.options(n).get("between_blocks")]
        changed |= {
            module: _own_part(module.forward, part) for module in (self._copied.get_submodule(n) for n in between)
        }

        stream = StreamArgument(first)
        self._left = None

        def split(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return stream.replaced(stream.of(args, kwargs)[..., part, :], args, kwargs)

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            self._left = forwards.first_tensor(output)
            raise forwards.Stopped

        handles = [first.register_forward_pre_hook(split, with_kwargs=True), last.register_forward_hook(stop)]
        try:
            with forwards.replaced(changed):
                self._copied(**self._inputs)
        except forwards.Stopped:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if self._left is None:
            raise TypeError("its blocks return no tensor")
        return self._left

    def _is_sequence(self, dim: int, parts: list[Tensor]) -> bool:
        return dim == self._whole.dim() - 2 and super()._is_sequence(dim, parts)

    def _parts(self) -> NamedModules:
        return [(name, self._copied.get_submodule(name)) for name in self._roles.named("block")]


def _own_part(forward: Callable[..., Any], part: slice) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*args, **kwargs)[..., part, :]
