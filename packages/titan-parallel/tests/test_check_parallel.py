"""`check_parallel`: passes where a mesh gives what one process gives, and says what is wrong with a question."""

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
    """`check("fsdp2", "tp2_sp", ...)` of the small transformer."""

    def on(*names, build=small.make_model, roles=small.ROLES, **options):
        parallelism = options.pop("parallelism", None) or meshes(*names)
        return check_parallel(build, parallelism, roles=roles, **options)

    return on


def test_every_mesh_gives_what_one_process_gives(check):
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
    "recomputation", [FullActivationCheckpoint.Config(), SelectiveActivationCheckpoint.Config()], ids=["full", "dear"]
)
def test_it_holds_with_recomputation_in_fp32(check, recomputation):
    report = check("fsdp2", "tp2_sp", dtype=torch.float32, activation_checkpoint=recomputation)
    assert report.ok, report
    assert 0.01 < report.meshes["tp2_sp"].kinds["gradients"].worst < 1  # fp32 rounds, by less than the rule allows


class Cancels(nn.Module):
    """Its activations lose all but three decimal places in fp32."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)

    def forward(self, ids):
        return self.head((self.words(ids) + 1e5) - 1e5)


def test_what_fp32_does_not_compute_is_judged_in_fp64_alone():
    roles = {"words": "embedding", "head": "head"}
    with pytest.raises(ConfigError, match=r"dtype must be torch.float64 for this model, got torch.float32"):
        check_parallel(Cancels, meshes("fsdp2"), roles=roles, dtype=torch.float32, steps=1)
    assert check_parallel(Cancels, meshes("fsdp2"), roles=roles, steps=1).ok


def test_what_runs_in_fp32_alone_is_told_so():
    class OnlyFp32(Cancels):
        def forward(self, ids):
            if self.head.weight.dtype is torch.float64:
                raise TypeError("no kernel for Double")
            return self.head(self.words(ids))

    roles = {"words": "embedding", "head": "head"}
    with pytest.raises(RuntimeError, match=r"no kernel for Double \(in float64, by which float32 is judged\)"):
        check_parallel(OnlyFp32, meshes("fsdp2"), roles=roles, dtype=torch.float32, steps=1)


@pytest.mark.full
def test_it_holds_with_compiled_blocks(check):
    report = check("fsdp2", "tp2_sp", compile=Compile.Config(backend="aot_eager"), dtype=torch.float32)
    assert report.ok, report


class Wide(nn.Module):
    """Computes its norms in float32 whatever it is given, as many models do, and drops half of what it made."""

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
def test_float32_islands_of_foreign_code_are_lifted_also_in_recomputation(recomputation):
    report = check_parallel(Wide, meshes("fsdp2", "tp2_sp"), roles=WIDE_ROLES, activation_checkpoint=recomputation)
    assert report.ok, report
    assert report.meshes["tp2_sp"].kinds["gradients"].worst < 0.01
    assert torch.get_default_dtype() is torch.float32


def test_nothing_of_the_caller_is_needed_or_changed(check):
    """A process that made gradients; closures, three ranks, a batch of one's own."""
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
    return (head(hidden) - targets["wanted"]).pow(2).sum(), torch.tensor(targets["wanted"].numel())


def test_a_model_of_numbers_with_a_loss_of_ones_own():
    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    inputs, wanted = torch.randn(4, 4), torch.randn(4, 3)
    batch = SimpleNamespace(inputs={"input": inputs}, targets={"wanted": wanted}, sequence_dims={})
    report = check_parallel(build, meshes("fsdp2"), roles={"2": "head"}, batch=batch, loss=loss_of_squares)
    assert report.ok, report


def test_a_rank_that_raises_ends_the_others_and_is_named(small):
    def build():
        model = small.make_model()
        if os.environ.get("RANK") == "1":
            model.layers[1].feed_forward.up.forward = lambda x: 1 / 0
        return model

    report = check_parallel(build, meshes("fsdp2", "tp2"), roles=small.ROLES, timeout_s=3600)  # for which nobody waits
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
    assert "no answer in 15 s" in report.meshes["fsdp2"].failure
    report = check_parallel(dies, meshes("fsdp2"), roles=small.ROLES)
    assert report.meshes["fsdp2"].failure == "rank 0: the process ended with code 7"


def test_a_build_that_differs_between_ranks_is_refused(small):
    def build():
        model = small.make_model()
        with torch.no_grad():
            model.norm.weight += int(os.environ.get("RANK", 0))
        return model

    report = check_parallel(build, meshes("fsdp2"), roles=small.ROLES)
    assert "rank 1: ConfigError: Got a build that gave norm.weight another value" in report.meshes["fsdp2"].failure


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.bfloat16}, "dtype must be torch.float64.*got torch.bfloat16"),
        ({"steps": 0}, "Got steps 0"),
        ({"num_microbatches": 0}, "Got num_microbatches 0"),
        ({"world_size": 3}, "tensor_parallel_degree 2 on 3 ranks"),
        ({"roles": {"embeding": "embedding"}}, "Did you mean 'embedding'"),
        ({"roles": None}, "Got a Transformer without roles"),
        ({"build": lambda: Wide().fill_(1)}, "no attribute 'fill_'"),
        ({"batch": SimpleNamespace(inputs={"tokens": torch.zeros(3, 4)}, targets={}, sequence_dims={})}, "of 3 rows"),
    ],
)
def test_a_wrong_question_is_an_error(check, changes, message):
    with pytest.raises((ConfigError, RuntimeError), match=message):
        check("tp2", **changes)


def test_a_mesh_that_the_model_does_not_fit_is_a_finding_and_the_others_are_checked(check):
    report = check("tp3", "fsdp2")
    assert report.meshes["tp3"].failure.startswith("every rank: ConfigError: Got ")
    assert not report.ok and report.meshes["fsdp2"].ok


def test_a_batch_cannot_be_made_up_for_every_forward():
    class Odd(nn.Linear):
        def forward(self, image, mask):
            return super().forward(image * mask)

    with pytest.raises(ConfigError, match="takes image, mask"):
        check_parallel(lambda: Odd(3, 3), meshes("fsdp2"), roles={})


def test_a_process_that_is_a_rank_cannot_ask(run_ranks, small):
    def ask():
        with pytest.raises(RuntimeError, match="a rank already"):
            check_parallel(small.make_model, meshes("fsdp2"), roles=small.ROLES)

    run_ranks(1, ask)


def test_cuda_that_is_in_use_is_refused(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="has used CUDA"):
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
    """A module of somebody's own, in the current folder."""
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


def test_the_command_says_yes_with_0_no_with_1_and_what_with_2(module, capsys):
    assert main(["check", "my_bigrams:Bigrams", "--mesh", "fsdp2", "ddp2"]) == 0
    assert "2 of 2 meshes" in capsys.readouterr().out
    arguments = ["check", "my_bigrams:Wrong", "--parallelism", "data_parallel_shard_degree=2", "--steps", "1", "--json"]
    assert main(arguments) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False and said["meshes"]["data_parallel_shard_degree=2"]["findings"]
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
