"""`check_parallel` passes if a mesh matches one process, and rejects wrong arguments."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError
from titan_parallel import (
    Compile,
    FullActivationCheckpoint,
    ParallelDims,
    SelectiveActivationCheckpoint,
    check_parallel,
)
from titan_parallel.__main__ import main
from titan_parallel.check import meshes
from torch import nn


@pytest.fixture(scope="module")
def check(small):
    """Return a function that checks the small transformer: `check("fsdp2", "tp2_sp", ...)`."""

    def on(*names, build=small.make_model, roles=small.ROLES, **options):
        parallelism = options.pop("parallelism", None) or meshes(*names)
        return check_parallel(build, parallelism, roles=roles, **options)

    return on


def test_every_mesh_matches_one_process(check):
    report = check("fsdp2", "ddp2", "tp2", "tp2_sp", "ddp2_fsdp2", "fsdp2_tp2_sp")
    assert report.ok, report
    report.raise_for_failure()
    assert list(report.meshes) == ["fsdp2", "ddp2", "tp2", "tp2_sp", "ddp2_fsdp2", "fsdp2_tp2_sp"]
    for mesh in report.meshes.values():
        assert {name: kind.count for name, kind in mesh.kinds.items()} == {
            "gradients": 40,
            "norms": 3,
            "losses": 4,
            "weights": 40,
        }
        assert all(kind.worst < 0.01 for kind in mesh.kinds.values())
    assert "6 of 6 meshes" in str(report) and "40 gradients; worst: " in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "recomputation",
    [FullActivationCheckpoint.Config(), SelectiveActivationCheckpoint.Config()],
    ids=["full", "selective"],
)
def test_meshes_match_with_activation_checkpointing_in_fp32(check, recomputation):
    report = check("fsdp2", "tp2_sp", dtype=torch.float32, activation_checkpoint=recomputation)
    assert report.ok, report
    assert 0.01 < report.meshes["tp2_sp"].kinds["gradients"].worst < 1  # fp32 rounds, within the tolerance


class Cancels(nn.Module):
    """A model whose activations lose all but three decimal places in fp32."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)

    def forward(self, ids):
        return self.head((self.words(ids) + 1e5) - 1e5)


def test_a_model_with_a_large_fp32_rounding_error_is_rejected_in_fp32():
    roles = {"words": "embedding", "head": "head"}
    with pytest.raises(
        ConfigError, match=r"dtype must be torch\.float64 for this model, got torch\.float32, whose rounding error"
    ):
        check_parallel(Cancels, meshes("fsdp2"), roles=roles, dtype=torch.float32, steps=1)
    assert check_parallel(Cancels, meshes("fsdp2"), roles=roles, steps=1).ok


def test_a_model_that_runs_in_fp32_only_is_rejected():
    class OnlyFp32(Cancels):
        def forward(self, ids):
            if self.head.weight.dtype is torch.float64:
                raise TypeError("no kernel for Double")
            return self.head(self.words(ids))

    roles = {"words": "embedding", "head": "head"}
    with pytest.raises(
        RuntimeError, match=r"no kernel for Double \(in the float64 run that is the reference for float32\)"
    ):
        check_parallel(OnlyFp32, meshes("fsdp2"), roles=roles, dtype=torch.float32, steps=1)


@pytest.mark.full
def test_meshes_match_with_compiled_blocks(check):
    report = check("fsdp2", "tp2_sp", compile=Compile.Config(backend="aot_eager"), dtype=torch.float32)
    assert report.ok, report


class Wide(nn.Module):
    """A model that computes its norms in float32 for any input dtype, as many do, and has dropout."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.layers = nn.Sequential(*(WideLayer() for _ in range(2)))

    def forward(self, ids):
        return self.head(self.layers(self.words(ids)))


class WideLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 16))

    def forward(self, x):
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).to(torch.float32) + 1e-6)).type_as(x)
        return x + self.mlp(torch.softmax(normed * self.gain, -1, dtype=torch.float32).to(x.dtype))


WIDE_ROLES = {
    "words": "embedding",
    "layers.*": "block",
    "layers.*.mlp": "region",
    "layers.*.mlp.0": "colwise",
    "layers.*.mlp.2": "rowwise",
    "head": "head",
}


@pytest.mark.parametrize("recomputation", [None, FullActivationCheckpoint.Config()], ids=["keep", "full"])
def test_float32_computations_of_third_party_code_are_made_in_float64_also_in_recomputation(recomputation):
    report = check_parallel(Wide, meshes("fsdp2", "tp2_sp"), roles=WIDE_ROLES, activation_checkpoint=recomputation)
    assert report.ok, report
    assert report.meshes["tp2_sp"].kinds["gradients"].worst < 0.01
    assert torch.get_default_dtype() is torch.float32


def test_the_state_of_the_caller_is_not_changed(check):
    """Tested from a process that has run a backward, with closures, three ranks and a custom batch."""
    weight = torch.randn(300, 300, requires_grad=True)
    (weight @ weight).exp().sum().backward()
    before = torch.get_rng_state()
    ids = torch.randint(20, (6, 10), generator=torch.Generator().manual_seed(3))
    labels = ids.roll(-1, 1)
    labels[0, 2:] = -100
    batch = SimpleNamespace(inputs={"ids": ids}, targets={"labels": labels}, sequence_dims={"ids": 1, "labels": 1})
    report = check_parallel(
        lambda: Wide(), ParallelDims.Config(), world_size=3, roles=WIDE_ROLES, batch=batch, num_microbatches=1, steps=2
    )
    assert report.ok and report.meshes["mesh"].num_ranks == 3
    assert torch.equal(before, torch.get_rng_state())
    assert "RANK" not in os.environ


def loss_of_squares(head, hidden, targets):
    return (head(hidden) - targets["expected"]).pow(2).sum(), torch.tensor(targets["expected"].numel())


def test_a_model_of_floating_point_inputs_with_a_custom_loss():
    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    inputs, expected = torch.randn(4, 4), torch.randn(4, 3)
    batch = SimpleNamespace(inputs={"input": inputs}, targets={"expected": expected}, sequence_dims={})
    report = check_parallel(build, meshes("fsdp2"), roles={"2": "head"}, batch=batch, loss=loss_of_squares)
    assert report.ok, report


def test_an_error_on_one_rank_ends_all_ranks_and_names_it(small):
    def build():
        model = small.make_model()
        if os.environ.get("RANK") == "1":
            model.layers[1].feed_forward.up.forward = lambda x: 1 / 0
        return model

    report = check_parallel(build, meshes("fsdp2", "tp2"), roles=small.ROLES, timeout_s=3600)  # ends long before
    assert not report.ok
    for mesh in report.meshes.values():
        assert mesh.failure == "rank 1: ZeroDivisionError: division by zero (in layers.1.feed_forward.up)"
        assert "Traceback" in mesh.trace
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        report.raise_for_failure()


def test_a_rank_that_hangs_or_dies_is_named(small):
    def hangs():
        if os.environ.get("RANK") == "1":
            time.sleep(10_000)
        return Cancels()

    def dies():
        if os.environ.get("RANK") == "0":
            os._exit(7)
        return small.make_model()

    roles = {"words": "embedding", "head": "head"}
    report = check_parallel(hangs, meshes("fsdp2"), roles=roles, steps=1, timeout_s=15)
    assert "no result within 15 s" in report.meshes["fsdp2"].failure
    report = check_parallel(dies, meshes("fsdp2"), roles=small.ROLES)
    assert report.meshes["fsdp2"].failure == "rank 0: the process ended with code 7"


def test_a_build_that_differs_between_ranks_is_rejected(small):
    def build():
        model = small.make_model()
        with torch.no_grad():
            model.norm.weight += int(os.environ.get("RANK", 0))
        return model

    report = check_parallel(build, meshes("fsdp2"), roles=small.ROLES)
    failure = report.meshes["fsdp2"].failure
    assert "rank 1: ConfigError: build must return the same weights on every rank" in failure
    assert "for norm.weight on this rank" in failure


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.bfloat16}, "dtype must be torch.float64.*got torch.bfloat16"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num_microbatches": 0}, "num_microbatches must be at least 1, got 0"),
        ({"world_size": 3}, r"tensor_parallel_degree must divide the number of ranks \(3\), got 2"),
        ({"roles": {"embeding": "embedding"}}, "Did you mean 'embedding'"),
        ({"roles": None}, "roles must be given .*, got Transformer"),
        ({"build": lambda: Wide().fill_(1)}, "no attribute 'fill_'"),
        (
            {"batch": SimpleNamespace(inputs={"tokens": torch.zeros(3, 4)}, targets={}, sequence_dims={})},
            "multiple of 2 .*, got 3",
        ),
    ],
)
def test_wrong_arguments_are_rejected(check, changes, message):
    with pytest.raises((ConfigError, RuntimeError), match=message):
        check("tp2", **changes)


def test_a_mesh_that_rejects_the_model_fails_and_the_others_are_checked(check):
    report = check("tp3", "fsdp2")
    assert report.meshes["tp3"].failure.startswith("all ranks: ConfigError: ")
    assert not report.ok and report.meshes["fsdp2"].ok


def test_a_model_with_unknown_inputs_requires_a_batch():
    class Odd(nn.Linear):
        def forward(self, image, mask):
            return super().forward(image * mask)

    with pytest.raises(ConfigError, match=r"For a synthetic batch .* which takes image, mask\. Pass batch"):
        check_parallel(lambda: Odd(3, 3), meshes("fsdp2"), roles={})


def test_check_parallel_is_rejected_inside_a_process_group(run_ranks, small):
    def check_inside():
        with pytest.raises(RuntimeError, match="outside a process group"):
            check_parallel(small.make_model, meshes("fsdp2"), roles=small.ROLES)

    run_ranks(1, check_inside)


def test_check_parallel_is_rejected_after_cuda_is_initialized(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="before CUDA is initialized"):
        check("fsdp2")


def test_meshes_have_short_names():
    assert meshes("ddp2_fsdp2_tp4_sp")["ddp2_fsdp2_tp4_sp"] == ParallelDims.Config(
        data_parallel_replicate_degree=2, data_parallel_shard_degree=2, tensor_parallel_degree=4, sequence_parallel=True
    )
    assert meshes("tp2")["tp2"].sequence_parallel is False
    for wrong in ("fdsp2", "tp", "2", ""):
        with pytest.raises(ConfigError, match="Write fsdp2"):
            meshes(wrong)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user module, `my_bigrams.py`, in the current folder."""
    tmp_path.joinpath("my_bigrams.py").write_text(
        "import torch.distributed as dist\n"
        "from torch import nn\n"
        "class Bigrams(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Embedding(20, 8), nn.Linear(8, 20))\n"
        "    def roles(self):\n"
        "        return {'0': 'embedding', '1': 'head'}\n"
        "class Head(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * (2 if dist.is_initialized() else 1)\n"
        "class Wrong(Bigrams):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self[1] = Head(8, 20)\n"
    )
    monkeypatch.chdir(tmp_path)


def test_exit_codes_are_0_for_a_match_1_for_a_difference_and_2_for_a_usage_error(module, capsys):
    assert main(["check", "my_bigrams:Bigrams", "--mesh", "fsdp2", "ddp2"]) == 0
    assert "2 of 2 meshes" in capsys.readouterr().out
    arguments = ["check", "my_bigrams:Wrong", "--parallelism", "data_parallel_shard_degree=2", "--steps", "1", "--json"]
    assert main(arguments) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False and printed["meshes"]["data_parallel_shard_degree=2"]["findings"]
    for wrong in (
        ["my_bigrams:Bigrams"],
        ["my_bigrams:Missing", "--mesh", "fsdp2"],
        ["nowhere:build", "--mesh", "fsdp2"],
        ["my_bigrams:Bigrams", "--mesh", "fsdp"],
        ["--mesh", "fsdp2"],
        ["my_bigrams:Bigrams", "--parallelism", "tensor_paralel_degree=2"],
        ["my_bigrams:Bigrams", "--parallelism", "tensor_parallel_degree=two"],
        ["--hf", "nowhere.json", "--mesh", "fsdp2"],
    ):
        assert main(["check", *wrong]) == 2, wrong
        assert capsys.readouterr().err
