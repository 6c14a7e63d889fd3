"""What a run says before its first step: rates of 0, weights that rounding keeps in place, endless validations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError, Configurable, cli
from titan_trainer import Profiler, TensorBoard, Validator, WarmupStableDecay
from titan_trainer.settings import Debug
from torch import nn

RATE = "The learning rate is 0 in steps"
ROUNDING = "Trained parameters are stored in"


@pytest.fixture
def warnings_of(run_ranks, toy_config, caplog):
    """`warnings_of(act, *all_changes)`: what each rank logged while `act(config)` ran, for each config."""

    def warnings_of(act, *all_changes, num_ranks: int = 1) -> list[list[list[str]]]:
        def logged():
            said = []
            for changes in all_changes:
                caplog.clear()
                act(toy_config(**changes))
                said.append([record.getMessage() for record in caplog.records])
            return said

        return run_ranks(num_ranks, logged)

    return warnings_of


SCHEDULES = [
    ({"total_steps": 6}, "7 to 10: lr_scheduler.total_steps is 6, training.steps is 10."),
    ({"total_steps": 6, "decay_type": "cosine"}, "7 to 10"),
    ({"total_steps": 6, "decay_ratio": 0.5}, "7 to 10"),
    ({"total_steps": 6, "min_lr_factor": 0.1}, None),
    ({"total_steps": 10}, None),
    ({"total_steps": None}, None),
    ({"total_steps": 20}, None),
    ({"total_steps": 6, "decay_ratio": 0.0}, None),
    ({"total_steps": 3, "warmup_steps": 5}, None),
    ({"total_steps": None, "warmup_steps": 50}, None),
]


def test_steps_at_rate_0_are_told_before_the_first(warnings_of):
    def train(config):
        trainer = config.build()
        trainer.has_next_step = lambda: False
        trainer.train()

    schedules = [WarmupStableDecay.Config(**{"warmup_steps": 2, **settings}) for settings, _ in SCHEDULES]
    (said,) = warnings_of(train, *({"lr_scheduler": schedule} for schedule in schedules))
    for schedule, (settings, idle), lines in zip(schedules, SCHEDULES, said, strict=True):
        told = [line for line in lines if line.startswith(RATE)]
        assert len(told) == (idle is not None), settings
        if idle:
            assert told[0].startswith(f"{RATE} {idle}")
            assert "--lr_scheduler.total_steps to None or 10" in told[0]
        factors = [schedule.build(training_steps=10).factor(step) for step in range(10)]
        assert (0 in factors) == (idle is not None)


def test_a_resumed_run_that_grows_says_what_becomes_of_the_schedule(run_ranks, toy_config, toy, capfd, caplog):
    def grow(total_steps: int | None):
        for steps in (4, 8):
            config = toy_config(
                checkpoint=toy.Checkpointer.Config(),
                lr_scheduler=WarmupStableDecay.Config(warmup_steps=2, total_steps=total_steps if steps == 8 else None),
                dump_folder=toy_config().dump_folder / str(total_steps),
            )
            config.training.steps = steps
            trainer = config.build()
            trainer.train()
        return trainer.schedule.factor(7), [r.getMessage() for r in caplog.records if RATE in r.getMessage()]

    ((stretched, told),) = run_ranks(1, grow, None)
    said = capfd.readouterr().out
    assert "the learning rate now decays until step 8; --lr_scheduler.total_steps 4 keeps" in said
    assert (stretched, told) == (pytest.approx(1 / 6), [])
    ((kept, told),) = run_ranks(1, grow, 4)
    assert "the learning rate now decays" not in capfd.readouterr().out
    assert kept == 0
    assert told[0].startswith(f"{RATE} 5 to 8: lr_scheduler.total_steps is 4, training.steps is 8.")


class Stored(Configurable):
    """A converter that stores some parameters in another type, and freezes some."""

    class Config(Configurable.Config):
        dtype: torch.dtype
        names: list[str] = ["head.weight"]
        frozen: list[str] = []

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model: nn.Module) -> None:
        for name in self.config.names:
            model.get_parameter(name).data = model.get_parameter(name).data.to(self.config.dtype)
        for name in self.config.frozen:
            model.get_parameter(name).requires_grad_(False)

    def after_step(self, model: nn.Module) -> None: ...


def test_weights_stored_in_16_bits_are_told_once_by_the_first_rank_unless_they_are_frozen(warnings_of, toy_config):
    changes = [
        {},
        {"training": copy.deepcopy(toy_config().training)},
        {"model_converters": [Stored.Config(dtype=torch.float16)]},
        {"model_converters": [Stored.Config(dtype=torch.bfloat16, frozen=["head.weight"])]},
    ]
    changes[1]["training"].dtype = "bfloat16"
    said = warnings_of(lambda config: config.build(), *changes)[0]
    told = ["".join(line.partition(":")[0] for line in lines if ROUNDING in line) for lines in said]
    whole, part = "bfloat16 (4 here, embedding.weight first)", "float16 (1 here, head.weight first)"
    assert told == ["", f"{ROUNDING} {whole}", f"{ROUNDING} {part}", ""]
    first, second = warnings_of(lambda config: config.build(), changes[1], num_ranks=2)
    assert [len([line for line in lines if ROUNDING in line]) for (lines,) in (first, second)] == [1, 0]


def test_what_the_warning_says_is_so():
    """200 steps of AdamW at 1e-4, with weight decay: in bfloat16 a gain of 1 stays 1, in float32 it moves."""
    gains = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        norm = nn.RMSNorm(16, dtype=dtype)
        optimizer = torch.optim.AdamW(norm.parameters(), lr=1e-4, weight_decay=0.1)
        for _ in range(200):
            norm(torch.randn(4, 16, dtype=dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        gains[dtype] = norm.weight.detach().float()
    assert torch.equal(gains[torch.bfloat16], torch.ones(16))
    assert (1 - gains[torch.float32]).min() > 0.01


class EndlessLoader(Configurable):
    class Config(Configurable.Config):
        infinite: bool = True


def test_a_validation_without_an_end_is_refused():
    for changes in ({"tokens": 3}, {"tokens": None, "dataloader": EndlessLoader.Config(infinite=False)}):
        Validator.Config(**{"dataloader": EndlessLoader.Config()} | changes).validate()
    with pytest.raises(
        ConfigError, match=r"validator\.tokens must be a number .*--validator\.dataloader\.infinite False"
    ):
        Validator.Config(dataloader=EndlessLoader.Config()).validate()


def test_a_loader_that_does_not_end_and_does_not_say_so_is_told(toy, caplog):
    loader = toy.Loader.Config().build(tokenizer=None, seq_len=2, global_batch_size=1, local_batch_size=1, seed=0)
    dims = SimpleNamespace(dp_rank=0, dp_size=1)
    parallel = SimpleNamespace(dims=dims, evaluate=lambda batches, loss: (1.0, 1))
    validator = Validator.Config(dataloader=toy.Loader.Config()).build(loader=loader, parallel=parallel, loss=None)
    batch = loader.next_batches(0, 1)
    loader.draw = lambda rank, num_ranks: batch if loader.next_row < 10_001 else []
    assert validator.validate() == 1.0
    assert [record.getMessage() for record in caplog.records] == [
        "Validated on 10000 batches, and is not done: see --validator.tokens."
    ]


def test_a_validation_ends_with_the_batch_that_makes_its_tokens(toy):
    loader = toy.Loader.Config().build(tokenizer=None, seq_len=2, global_batch_size=1, local_batch_size=1, seed=0)
    dims = SimpleNamespace(dp_rank=0, dp_size=1)
    parallel = SimpleNamespace(dims=dims, evaluate=lambda batches, loss: (1.0, 7))
    config = Validator.Config(dataloader=toy.Loader.Config(), tokens=10)
    validator = config.build(loader=loader, parallel=parallel, loss=None)
    assert validator.validate() == 2 / 14


def test_a_validation_without_targets_ends(toy):
    loader = toy.Loader.Config().build(tokenizer=None, seq_len=2, global_batch_size=1, local_batch_size=1, seed=0)
    dims = SimpleNamespace(dp_rank=0, dp_size=1)
    parallel = SimpleNamespace(dims=dims, evaluate=lambda batches, loss: (0.0, 0))
    config = Validator.Config(dataloader=toy.Loader.Config(), tokens=10)
    validator = config.build(loader=loader, parallel=parallel, loss=None)
    with pytest.raises(ValueError, match="Got no valid target in 10000 batches"):
        validator.validate()


def test_a_validation_that_is_stopped_gives_no_loss(toy):
    loader = toy.Loader.Config().build(tokenizer=None, seq_len=2, global_batch_size=1, local_batch_size=1, seed=0)
    parallel = SimpleNamespace(dims=SimpleNamespace(dp_rank=0, dp_size=1), evaluate=lambda batches, loss: (1.0, 1))
    answers = iter([False, False, True])
    validator = Validator.Config(dataloader=toy.Loader.Config()).build(
        loader=loader, parallel=parallel, loss=None, is_stopped=lambda: next(answers)
    )
    assert validator.validate() is None
    assert loader.next_row == 2


@pytest.mark.parametrize("seed", [2**64, -1, 10**4000])
def test_seeds_that_no_generator_takes_are_refused(toy_config, seed, capsys):
    with pytest.raises(ConfigError, match=r"debug\.seed must be from 0 to 2\*\*64 - 1, got"):
        toy_config(debug=Debug(seed=seed)).build()
    with pytest.raises(SystemExit):
        cli(toy_config(), ["--debug.seed", str(seed)])
    assert "debug.seed must be from 0" in capsys.readouterr().err
    cli(toy_config(), ["--debug.seed", str(2**64 - 1)])


@pytest.mark.parametrize("flag", ["--optimizer.lr", "--training.max_norm", "--lr_scheduler.min_lr_factor"])
def test_numbers_of_a_run_are_finite(toy_config, flag, capsys):
    for number in (math.nan, math.inf):
        with pytest.raises(SystemExit):
            cli(toy_config(), [flag, str(number)])
        assert str(number) in capsys.readouterr().err


def test_remote_folders_are_refused_and_no_folder_is_made(toy_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["--dump_folder", "s3://bucket/run"], ["--dump_folder=S3:/x"], ["--config", "gs://bucket/run.json"]):
        with pytest.raises(SystemExit) as end:
            cli(toy_config(), words)
        assert end.value.code == 2
        assert "must be a local path" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="dump_folder must be a local path"):
        toy_config(dump_folder=Path("s3://bucket/run"))
    for part in (Profiler.Config(save_traces_folder="s3://b"), TensorBoard.Config(folder="s3://b")):
        with pytest.raises(ConfigError, match="folder must be a local path, got s3://b"):
            part.validate()
    assert list(tmp_path.iterdir()) == []
