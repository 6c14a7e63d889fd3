"""Context parallel by a ring: keys and values go round, and softmax is taken block by block (Liu et al., 2023).

B batch, t tokens of one rank, H query heads, G key-value heads, K features of keys, V of values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_parallel.context_parallel.all_gather import with_whole
from titan_parallel.context_parallel.attention_kernel import AttentionKernel, BuildMask, MaskDescription
from titan_parallel.context_parallel.sequence_sharding import ContextShards
from titan_parallel.memory.activation_checkpoint import recomputed_operators


@dataclass(frozen=True)
class Tile:
    """Some of this rank's queries, some keys of another rank, and which of them see each other."""

    queries: slice
    keys: slice
    built_mask: Any


class Ring:
    """Keeps no more than its own keys and values: those of the others come by, one rank at a time, while it computes.

    Blocks that the mask hides wholly are skipped; the mask is looked at once a forward (on GPUs the host waits for it).
    The backward sends keys and values round again and computes each block again. Runs outside of compiled code.
    """

    def __init__(self, shards: ContextShards, group: dist.ProcessGroup) -> None:
        self._shards = shards
        self._neighbors = Neighbors(group)

    def build_mask(self, build_mask: BuildMask, mask: MaskDescription) -> list[list[Tile]]:
        """For each step of the ring, the blocks to compute, each as the core's own `build_mask` makes it."""
        rank, size = self._shards.axis.rank, self._shards.axis.size
        whole: Any = with_whole(mask, ("key_positions", "key_documents"), self._shards)
        length = mask.query_positions.size(1) // self._shards.num_parts
        places = [slice(part * length, (part + 1) * length) for part in range(self._shards.divisor)]
        found: list[tuple[int, slice, slice, Any]] = []
        for step in range(size):
            for queries in places[: self._shards.num_parts]:
                for index, part in enumerate(self._shards.parts((rank - step) % size)):
                    found.append((step, queries, places[index], _block(whole, queries, places[part])))
        seen = torch.stack([block.visible().any() for *_, block in found]).tolist()
        blocks: list[list[Tile]] = [[] for _ in range(size)]
        for (step, queries, keys, block), is_seen in zip(found, seen, strict=True):
            if is_seen:
                blocks[step].append(Tile(queries, keys, build_mask(block)))
        return blocks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, built_mask: list[list[Tile]]) -> Tensor:
        """`[B, t, ..]` to `[B, t, ..]`."""
        with recomputed_operators():
            output, lse = _Ring.apply(q, k, v, kernel, built_mask, self._neighbors)
        return kernel.sunk(output, lse)


def _block(mask: Any, queries: slice, keys: slice) -> Any:
    fields = {"query_positions": queries, "query_documents": queries, "key_positions": keys, "key_documents": keys}
    parts = {name: getattr(mask, name) for name in fields}
    cut = {name: part[:, fields[name]] for name, part in parts.items() if part is not None}
    return dataclasses.replace(mask, **cut)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kernel: AttentionKernel,
        blocks: list[list[Tile]],
        neighbors: Neighbors,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        output = q.new_zeros((*q.shape[:3], v.size(-1)), dtype=wide)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        kv = torch.cat([k, v], -1)
        for step, to_do in enumerate(blocks):
            coming = neighbors.pass_on(kv) if step + 1 < len(blocks) else None
            k_i, v_i = kv.split([k.size(-1), v.size(-1)], -1)
            for block in to_do:
                rows = (slice(None), block.queries)
                part = kernel.output_and_lse(
                    q[rows].contiguous(),
                    k_i[:, block.keys].contiguous(),
                    v_i[:, block.keys].contiguous(),
                    block.built_mask,
                )
                output[rows], lse[rows] = _merged(output[rows], lse[rows], *part)
            if coming is not None:
                kv = coming.wait()
        output = output.to(q.dtype)
        ctx.kernel, ctx.blocks, ctx.neighbors = kernel, blocks, neighbors
        ctx.save_for_backward(q, k, v, output, lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        d_output = d_output.to(lse.dtype)
        d_total = d_lse - (d_output * output).sum(-1)  # what lse gets, were each block's output zero
        d_q = torch.zeros_like(q, dtype=lse.dtype)
        kv, widths = torch.cat([k, v], -1), [k.size(-1), v.size(-1)]
        d_kv_coming: Arriving | None = None
        for step, to_do in enumerate(ctx.blocks):
            coming = ctx.neighbors.pass_on(kv) if step + 1 < len(ctx.blocks) else None
            d_kv = torch.zeros_like(kv, dtype=lse.dtype)
            for block in to_do:
                rows = (slice(None), block.queries)
                inputs = [q[rows], *kv[:, block.keys].split(widths, -1)]
                gradients = _block_gradients(
                    ctx.kernel, inputs, block.built_mask, lse[rows], d_output[rows], d_total[rows]
                )
                d_q[rows] += gradients[0]
                d_kv[:, block.keys] += torch.cat(gradients[1:], -1)
            if d_kv_coming is not None:
                d_kv += d_kv_coming.wait()
            d_kv_coming = ctx.neighbors.pass_on(d_kv)  # after as many steps as ranks it is home
            if coming is not None:
                kv = coming.wait()
        assert d_kv_coming is not None
        d_k, d_v = d_kv_coming.wait().split(widths, -1)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


def _merged(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys as attention to both."""
    lse = torch.logaddexp(lse_a, lse_b)
    return output_a * _share(lse_a, lse).unsqueeze(-1) + output_b * _share(lse_b, lse).unsqueeze(-1), lse


def _share(lse_of_part: Tensor, lse: Tensor) -> Tensor:
    """How much of a query's softmax lies in a part; nothing where it sees nothing."""
    return (lse_of_part - lse.masked_fill(lse == -torch.inf, 0)).exp()


def _block_gradients(
    kernel: AttentionKernel, inputs: list[Tensor], built_mask: Any, lse: Tensor, d_output: Tensor, d_total: Tensor
) -> tuple[Tensor, ...]:
    """What a block adds to the gradients of its queries, keys and values.

    With the share `w = exp(lse_block - lse)`: `d output_block = w d output`, and
    `d lse_block = w (d output . (output_block - output) + d lse)`.
    """
    with torch.enable_grad():
        q, k, v = (x.detach().contiguous().requires_grad_() for x in inputs)
        output_i, lse_i = kernel.output_and_lse(q, k, v, built_mask)
    share = _share(lse_i.detach(), lse)
    d_output_i = (share.unsqueeze(-1) * d_output).to(output_i.dtype)
    d_lse_i = share * ((d_output * output_i.detach()).sum(-1) + d_total)
    return torch.autograd.grad((output_i, lse_i), (q, k, v), (d_output_i, d_lse_i.to(lse_i.dtype)))


class Neighbors:
    """Sends to the next rank of a group what comes from the one before."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._next = dist.get_global_rank(group, (rank + 1) % size)
        self._previous = dist.get_global_rank(group, (rank - 1) % size)

    def pass_on(self, tensor: Tensor) -> Arriving:
        """Start sending `tensor`, and receiving one like it."""
        sent = tensor.contiguous()
        received = torch.empty_like(sent)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, self._next, self._group),
                dist.P2POp(dist.irecv, received, self._previous, self._group),
            ]
        )
        return Arriving(works, sent, received)


@dataclass(frozen=True)
class Arriving:
    """A tensor on its way; what is sent in exchange lives as long."""

    works: list[dist.Work]
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """The tensor, once it has come and the other has gone."""
        for work in self.works:
            work.wait()
        return self.received
