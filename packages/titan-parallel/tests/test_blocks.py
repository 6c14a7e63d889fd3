"""What recomputation and compilation do to blocks, beside leaving gradients as they are."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import (
    ActivationCheckpoint,
    Compile,
    FullActivationCheckpoint,
    PeriodicActivationCheckpoint,
    SelectiveActivationCheckpoint,
)
from torch.utils._python_dispatch import TorchDispatchMode

NUM_LAYERS = 10
MATRICES_OF_A_BLOCK = 7  # q, k, v, out, up, gate, down


class OperatorCounts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def operators_of_a_step(small, mesh, recomputation) -> Counter:
    """Operators of forward and backward that belong to blocks: the head's are the same for all."""
    shape = small.Shape(layers=NUM_LAYERS)
    parallel = small.put_on(mesh, small.make_model(shape), activation_checkpoint=recomputation)
    with OperatorCounts() as counter:
        parallel.forward_backward([small.make_batch()], small.chunked_loss, 1)
    return counter.counts


@pytest.mark.parametrize("mesh", ["one", "tp2_both"])
def test_recomputation_makes_again_what_it_says(run_ranks, small, mesh):
    def counts():
        return {
            name: operators_of_a_step(small, mesh, recomputation)
            for name, recomputation in {
                "keep": None,
                "full": FullActivationCheckpoint.Config(),
                "selective": SelectiveActivationCheckpoint.Config(),
                "every_3rd": PeriodicActivationCheckpoint.Config(n=3),
            }.items()
        }

    attention = "aten._scaled_dot_product_flash_attention_for_cpu"
    for of_rank in run_ranks(small.MESHES[mesh][0], counts):
        assert {name: of[attention] for name, of in of_rank.items()} == {
            "keep": NUM_LAYERS,
            "full": 2 * NUM_LAYERS,
            "selective": NUM_LAYERS,
            "every_3rd": NUM_LAYERS + 4,
        }
        products = {name: of["aten.addmm"] - of_rank["keep"]["aten.addmm"] for name, of in of_rank.items()}
        assert products["selective"] == 0
        assert products["full"] >= NUM_LAYERS * (MATRICES_OF_A_BLOCK - 1)  # the last product is needed by nobody
        assert of_rank["selective"]["aten.silu"] == of_rank["full"]["aten.silu"] == 2 * NUM_LAYERS
        sums = "_c10d_functional.reduce_scatter_tensor"
        assert of_rank["selective"][sums] == of_rank["keep"][sums]
        assert of_rank["full"][sums] > of_rank["keep"][sums] or mesh == "one"


def test_recomputation_of_ones_own_is_a_subclass(on_one_rank, small):
    class Noted(ActivationCheckpoint):
        seen = []

        def wrap(self, forward, index):
            self.seen.append(index)
            return forward

    def indices():
        small.put_on("one", small.make_model(small.Shape(layers=3)), activation_checkpoint=Noted.Config())
        return Noted.seen

    assert on_one_rank(indices) == [0, 1, 2]


def test_every_0th_block_is_refused():
    with pytest.raises(ConfigError, match="n must be at least 1"):
        PeriodicActivationCheckpoint.Config(n=0).build()


@pytest.mark.parametrize("mesh", ["one", "tp2_both"])
def test_identical_blocks_are_compiled_once(run_ranks, small, mesh):
    """Also where there are more of them than dynamo would recompile for one function (8)."""

    def compiled():
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        parallel = small.put_on(
            mesh,
            small.make_model(small.Shape(layers=NUM_LAYERS)),
            activation_checkpoint=FullActivationCheckpoint.Config(),
            compile=Compile.Config(backend="aot_eager"),
        )
        for _ in range(3):
            parallel.forward_backward([small.make_batch()], small.chunked_loss, 1)
        return dict(counters["stats"])["unique_graphs"], dict(counters["graph_break"])

    for num_graphs, breaks in run_ranks(small.MESHES[mesh][0], compiled):
        assert (num_graphs, breaks) == (1, {})
