"""Ring attention: keys and values pass around the ranks, and the softmax is accumulated by tiles (Liu et al., 2023).

B batch, t tokens of one rank, H query heads, G key-value heads, K features of keys, V of values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_parallel.context_parallel.all_gather import gather_fields
from titan_parallel.context_parallel.attention_kernel import AttentionKernel, BuildMask, MaskDescription
from titan_parallel.context_parallel.sequence_sharding import ContextShards
from titan_parallel.memory.activation_checkpoint import save_nothing


@dataclass(frozen=True)
class Tile:
    """A slice of this rank's queries, a slice of the keys of one rank, and the mask between them."""

    queries: slice
    keys: slice
    built_mask: Any


class Ring:
    """The method `ring`: keys and values of the other ranks arrive one rank at a time, while attention is computed.

    Only this rank's own keys and values are kept for the backward, which passes all of them around again and recomputes
    each tile. Fully masked tiles are skipped: they are found once per forward, and on GPUs the host waits for that.
    Runs outside of compiled code.
    """

    def __init__(self, shards: ContextShards, group: dist.ProcessGroup) -> None:
        self._shards = shards
        self._neighbors = Neighbors(group)

    def build_mask(self, build_mask: BuildMask, mask: MaskDescription) -> list[list[Tile]]:
        """Return the tiles to compute in each step of the ring, each with the core's mask."""
        rank, size = self._shards.axis.rank, self._shards.axis.size
        whole: Any = gather_fields(mask, ("key_positions", "key_documents"), self._shards)
        length = mask.query_positions.size(1) // self._shards.num_parts
        slices = [slice(part * length, (part + 1) * length) for part in range(self._shards.divisor)]
        candidates: list[tuple[int, slice, slice, Any]] = []
        for step in range(size):
            for queries in slices[: self._shards.num_parts]:
                for index, part in enumerate(self._shards.parts((rank - step) % size)):
                    candidates.append((step, queries, slices[index], _tile_mask(whole, queries, slices[part])))
        visible = torch.stack([tile_mask.visible().any() for *_, tile_mask in candidates]).tolist()
        tiles: list[list[Tile]] = [[] for _ in range(size)]
        for (step, queries, keys, tile_mask), is_visible in zip(candidates, visible, strict=True):
            if is_visible:
                tiles[step].append(Tile(queries, keys, build_mask(tile_mask)))
        return tiles

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, built_mask: list[list[Tile]]) -> Tensor:
        """Return the attention of this rank's queries to all keys, `[B, t, ..]`."""
        with save_nothing():
            output, lse = _Ring.apply(q, k, v, kernel, built_mask, self._neighbors)
        return kernel.with_sinks(output, lse)


def _tile_mask(mask: Any, queries: slice, keys: slice) -> Any:
    """Return the mask description of a slice of queries and a slice of keys."""
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
        tiles: list[list[Tile]],
        neighbors: Neighbors,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        output = q.new_zeros((*q.shape[:3], v.size(-1)), dtype=wide)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        kv = torch.cat([k, v], -1)
        for step, tiles_of_step in enumerate(tiles):
            next_kv = neighbors.send_to_next(kv) if step + 1 < len(tiles) else None
            k_i, v_i = kv.split([k.size(-1), v.size(-1)], -1)
            for tile in tiles_of_step:
                queries = (slice(None), tile.queries)
                partial = kernel.output_and_lse(
                    q[queries].contiguous(),
                    k_i[:, tile.keys].contiguous(),
                    v_i[:, tile.keys].contiguous(),
                    tile.built_mask,
                )
                output[queries], lse[queries] = _merge(output[queries], lse[queries], *partial)
            if next_kv is not None:
                kv = next_kv.wait()
        output = output.to(q.dtype)
        ctx.kernel, ctx.tiles, ctx.neighbors = kernel, tiles, neighbors
        ctx.save_for_backward(q, k, v, output, lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        d_output = d_output.to(lse.dtype)
        d_total = d_lse - (d_output * output).sum(-1)  # the gradient of a tile's lse, if the tile's output were zero
        d_q = torch.zeros_like(q, dtype=lse.dtype)
        kv, widths = torch.cat([k, v], -1), [k.size(-1), v.size(-1)]
        next_d_kv: PendingReceive | None = None
        for step, tiles_of_step in enumerate(ctx.tiles):
            next_kv = ctx.neighbors.send_to_next(kv) if step + 1 < len(ctx.tiles) else None
            d_kv = torch.zeros_like(kv, dtype=lse.dtype)
            for tile in tiles_of_step:
                queries = (slice(None), tile.queries)
                inputs = [q[queries], *kv[:, tile.keys].split(widths, -1)]
                gradients = _tile_gradients(
                    ctx.kernel, inputs, tile.built_mask, lse[queries], d_output[queries], d_total[queries]
                )
                d_q[queries] += gradients[0]
                d_kv[:, tile.keys] += torch.cat(gradients[1:], -1)
            if next_d_kv is not None:
                d_kv += next_d_kv.wait()
            next_d_kv = ctx.neighbors.send_to_next(
                d_kv
            )  # the last send returns the gradients to the rank of their keys
            if next_kv is not None:
                kv = next_kv.wait()
        assert next_d_kv is not None
        d_k, d_v = next_d_kv.wait().split(widths, -1)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


def _merge(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and log-sum-exp of attention to the union of two sets of keys, from those of each set."""
    lse = torch.logaddexp(lse_a, lse_b)
    return output_a * _share(lse_a, lse).unsqueeze(-1) + output_b * _share(lse_b, lse).unsqueeze(-1), lse


def _share(partial_lse: Tensor, lse: Tensor) -> Tensor:
    """Return the fraction of a query's softmax on some of its keys; 0 where the query sees no key."""
    return (partial_lse - lse.masked_fill(lse == -torch.inf, 0)).exp()


def _tile_gradients(
    kernel: AttentionKernel, inputs: list[Tensor], built_mask: Any, lse: Tensor, d_output: Tensor, d_total: Tensor
) -> tuple[Tensor, ...]:
    """Return the contributions of a tile to the gradients of its queries, keys and values.

    With the share `w = exp(lse_tile - lse)`: `d output_tile = w d output`, and
    `d lse_tile = w (d output . (output_tile - output) + d lse)`.
    """
    with torch.enable_grad():
        q, k, v = (x.detach().contiguous().requires_grad_() for x in inputs)
        output_i, lse_i = kernel.output_and_lse(q, k, v, built_mask)
    share = _share(lse_i.detach(), lse)
    d_output_i = (share.unsqueeze(-1) * d_output).to(output_i.dtype)
    d_lse_i = share * ((d_output * output_i.detach()).sum(-1) + d_total)
    return torch.autograd.grad((output_i, lse_i), (q, k, v), (d_output_i, d_lse_i.to(lse_i.dtype)))


class Neighbors:
    """Sends tensors to the next rank of a group, and receives from the previous one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._next = dist.get_global_rank(group, (rank + 1) % size)
        self._previous = dist.get_global_rank(group, (rank - 1) % size)

    def send_to_next(self, tensor: Tensor) -> PendingReceive:
        """Start to send `tensor` and to receive one of the same shape and dtype."""
        sent = tensor.contiguous()
        received = torch.empty_like(sent)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, self._next, self._group),
                dist.P2POp(dist.irecv, received, self._previous, self._group),
            ]
        )
        return PendingReceive(works, sent, received)


@dataclass(frozen=True)
class PendingReceive:
    """A pending receive; keeps the sent tensor alive until then."""

    works: list[dist.Work]
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """Wait for the send and the receive, and return the received tensor."""
        for work in self.works:
            work.wait()
        return self.received
