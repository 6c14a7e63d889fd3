"""Context parallel with the attention cores and masks of titan-models: fp64, by the rule, against one process."""

from __future__ import annotations

import pytest
import torch
from titan_models import Block, Chunks, Flex, GroupedQueryAttention, Normal, Rope, Sdpa, SlidingWindow, SwiGLU
from titan_models.llama3 import Llama3
from titan_parallel import Compile, SelectiveActivationCheckpoint, check_parallel, per_token
from titan_parallel.check import meshes

METHODS = ("cp2", "cp2_ulysses", "cp2_ring")
CORES = {"sdpa": Sdpa.Config(), "flex": Flex.Config(block_size=16)}


@pytest.fixture(autouse=True)
def flex_trains_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses flex attention's backward on a CPU, but can compute it: tests need no GPU."""
    import torch.nn.attention.flex_attention as module

    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def llama(core, *limits, **attention_options):
    attention = GroupedQueryAttention.Config(
        num_heads=4, num_kv_heads=2, head_dim=8, core=core, mask_modifiers=[*limits], **attention_options
    )
    block = Block.Config(attention=attention, feed_forward=SwiGLU.Config(hidden_dim=48))
    config = Llama3.Config(vocab_size=64, dim=32, num_layers=2, rope=Rope.Config(dim=8), block=block)

    def build() -> Llama3:
        model = config.build()
        model.init_weights(0)
        return model

    return build


@pytest.mark.parametrize("core", CORES)
def test_llama3_over_context_ranks_is_llama3(core):
    check_parallel(llama(CORES[core]), meshes(*METHODS), steps=1).raise_for_failure()


@pytest.mark.full
@pytest.mark.parametrize("method", ["", "_ulysses", "_ring"])
def test_with_everything_else(method):
    names = (f"cp2_tp2_sp{method}", f"ddp2_cp2{method}", f"cp4{method}", f"fsdp2_cp2_tp2_sp{method}")
    recomputation = SelectiveActivationCheckpoint.Config()
    report = check_parallel(llama(CORES["sdpa"]), meshes(*names), steps=1, activation_checkpoint=recomputation)
    report.raise_for_failure()


@pytest.mark.full
def test_it_holds_with_compiled_blocks():
    compiled = Compile.Config(backend="aot_eager")
    check_parallel(llama(CORES["sdpa"]), meshes(*METHODS), steps=1, compile=compiled).raise_for_failure()


@pytest.mark.parametrize("limit", [SlidingWindow.Config(size=3), Chunks.Config(size=4)], ids=["window", "chunks"])
@pytest.mark.parametrize("core", ["sdpa", pytest.param("flex", marks=pytest.mark.full)])
def test_windows_and_chunks_hold_across_ranks(core, limit):
    check_parallel(llama(CORES[core], limit), meshes(*METHODS), steps=1).raise_for_failure()


@pytest.mark.parametrize("core", ["sdpa", pytest.param("flex", marks=pytest.mark.full)])
def test_sinks_belong_to_heads_wherever_these_are(core):
    sunk = llama(CORES[core], sink_init=Normal.Config(std=1.0))
    check_parallel(sunk, meshes(*METHODS, "tp2", "cp2_tp2_sp_ulysses"), steps=1).raise_for_failure()


def test_sinks_that_the_ring_forgets_are_noticed(monkeypatch):
    monkeypatch.setattr(
        "titan_parallel.context_parallel.attention_kernel.AttentionKernel.with_sinks", lambda self, output, lse: output
    )
    report = check_parallel(llama(CORES["sdpa"], sink_init=Normal.Config(std=1.0)), meshes("cp2_ring"), steps=1)
    assert not report.ok


def test_ulysses_keeps_the_fast_path_and_flex_skips_blocks_alike_on_every_rank(run_ranks):
    def blocks(name: str) -> int:
        from titan_parallel import parallelize

        made = []
        core = Flex.Config(block_size=16)
        (config,) = meshes(name).values()
        model = llama(core)()
        build_mask = Flex.build_mask
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Flex, "build_mask", lambda self, mask: made.append(build_mask(self, mask)) or made[-1])
            parallel = parallelize(model, model.roles(), config.build(world_size=2, device_type="cpu"))
            positions = torch.arange(128)[None]
            parallel.evaluate([SimpleBatch({"tokens": positions % 64, "positions": positions})], loss)
        return sum(int((mask.kv_num_blocks + mask.full_kv_num_blocks).sum()) for mask in made)

    def plain_causal() -> bool:
        from titan_parallel import parallelize

        seen = []
        build_mask = Sdpa.build_mask
        model = llama(Sdpa.Config())()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Sdpa, "build_mask", lambda self, mask: seen.append(mask.only_causal) or build_mask(self, mask)
            )
            (config,) = meshes("cp2_ulysses").values()
            parallel = parallelize(model, model.roles(), config.build(world_size=2, device_type="cpu"))
            positions = torch.arange(16)[None]
            parallel.evaluate([SimpleBatch({"tokens": positions, "positions": positions})], loss)
        return seen == [True]

    for gather, ring, is_plain in run_ranks(2, lambda: (blocks("cp2"), blocks("cp2_ring"), plain_causal())):
        assert gather == 8 * 9 // 2 // 2  # of a mask of 8 x 8 blocks, the lower half
        assert ring == 8 * 9 // 2 // 2
        assert is_plain


class SimpleBatch:
    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs, self.targets = inputs, {"labels": inputs["tokens"] % 64}
        self.sequence_dims = dict.fromkeys([*inputs, "labels"], 1)


@per_token
def loss(head, hidden, targets):
    return head(hidden).sum(), (targets["labels"] >= 0).sum()
