"""A checkpoint leaves Titan: exported for Hugging Face it gives the logits that training left."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from titan_ckpt import Checkpointer, export_hf, load_hf, save_hf
from titan_parallel import ParallelDims, parallelize
from torch.distributed.tensor import DTensor


def whole_logits(trainer, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of a plain model with the trainer's weights."""
    plain = trainer.config.model.build()
    weights = trainer.model.state_dict()
    plain.load_state_dict({name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in weights.items()})
    with torch.no_grad():
        return plain(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


MORE = [pytest.param(flavor, False, marks=pytest.mark.full) for flavor in ("llama4_debug", "gpt_oss_debug")]


@pytest.mark.parametrize(
    ("flavor", "tied"),
    [("llama3_debug", False), ("llama3_debug", True), ("qwen3_moe_debug", False), *MORE],
)
@pytest.mark.parametrize(
    "parallelism", [{}, {"parallelism.tensor_parallel_degree": 2}], ids=["saved by FSDP 2", "saved by TP 2"]
)
def test_transformers_loads_an_exported_checkpoint_and_gives_its_logits(
    run_ranks, small_run, tmp_path, parallelism, flavor, tied, fp64_model, in_fp64
):
    config = small_run(changes={**parallelism, "training.steps": 3}, flavor=flavor)
    config.checkpoint = Checkpointer.Config(async_mode="disabled")
    config.model.max_seq_len = 512
    if tied:
        config.model.head = None
    tokens = torch.randint(0, 2048, (2, 300), generator=torch.Generator().manual_seed(0))

    def train() -> torch.Tensor:
        trainer = config.build()
        trainer.train()
        return whole_logits(trainer, tokens)

    expected = run_ranks(2, train)[0]
    export_hf(config.dump_folder / "checkpoint" / "step-3", tmp_path / "hf")
    transformers = pytest.importorskip("transformers", reason="the judge of this test")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", experts_implementation="eager")
    with torch.no_grad():
        plain = model(tokens).logits
        with in_fp64():
            exact = fp64_model(model)(tokens).logits
    assert (expected - exact).norm() <= 10 * (plain - exact).norm()  # of which both are fp32's rounding
    assert (plain - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flavor", ["llama3_debug", "qwen3_debug", "qwen3_moe_debug", "llama4_debug", "gpt_oss_debug"])
def test_a_model_of_transformers_comes_in_and_gives_its_logits(
    small_run, tmp_path, flavor, stored, fp64_model, in_fp64
):
    """Weights stored in bfloat16 are widened."""
    transformers = pytest.importorskip("transformers", reason="the judge of this test")
    config = small_run(flavor=flavor)
    hf_config = config.model.hf_adapter().hf_config()
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(hf_config.pop("model_type"), **hf_config)
    )
    hf.to(stored).save_pretrained(tmp_path / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, experts_implementation="eager"
    )
    model = config.model.build()
    load_hf(tmp_path / "hf", model.state_dict(), config.model.hf_adapter())
    model, hf, tokens = model.double(), fp64_model(hf), torch.randint(0, 2048, (2, 64))
    with torch.no_grad(), in_fp64():
        found, expected = model(tokens, torch.arange(64).expand_as(tokens)), hf(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


WITH_EXPERTS = ("qwen3_moe_debug", "llama4_debug", "gpt_oss_debug")


@pytest.mark.parametrize("flavor", ["deepseek_debug", *(pytest.param(f, marks=pytest.mark.full) for f in WITH_EXPERTS)])
def test_experts_come_in_and_go_out_on_a_mesh_bit_for_bit(run_ranks, small_run, tmp_path, flavor):
    """Each rank has a part of the features of some experts."""
    config = small_run(flavor=flavor)
    model, adapter = config.model.build(), config.model.hf_adapter()
    model.init_weights(seed=7)
    save_hf(model.state_dict(), adapter, tmp_path / "in")

    def come_and_go() -> None:
        dims = ParallelDims.Config(tensor_parallel_degree=2).build(world_size=4, device_type="cpu")
        split = parallelize(config.model.on_meta(), model.roles(), dims).model
        split.to_empty(device="cpu")
        split.init_weights(seed=8)
        load_hf(tmp_path / "in", split.state_dict(), adapter)
        save_hf(split.state_dict(), adapter, tmp_path / "out")

    run_ranks(4, come_and_go)
    given, found = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("in", "out"))
    assert given.keys() == found.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_a_run_in_pipeline_stages_begins_with_weights_of_hugging_face(run_ranks, small_run, tmp_path):
    """Each rank reads those of its stage, and all together are the model's."""
    changes = {"parallelism.pipeline_parallel_degree": 2, "training.steps": 1, "optimizer.lr": 1e-12}
    config = small_run(flavor="qwen3_moe_debug", changes=changes)
    model = config.model.build()
    model.init_weights(seed=7)
    save_hf(model.state_dict(), config.model.hf_adapter(), tmp_path / "hf")
    config.checkpoint = Checkpointer.Config(initial_load_path=tmp_path / "hf", initial_load_in_hf=True)

    def train() -> dict[str, torch.Tensor]:
        trainer = config.build()
        trainer.train()
        weights = trainer.model.state_dict().items()
        return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in weights}

    first, second = run_ranks(2, train)
    assert not first.keys() & second.keys()
    assert (first | second).keys() == model.state_dict().keys()
    for name, expected in model.named_parameters():
        torch.testing.assert_close((first | second)[name], expected.detach(), rtol=0, atol=1e-9)
