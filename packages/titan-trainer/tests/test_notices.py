"""Warnings and errors before the first step: learning rates of 0, 16-bit weights, endless validations, settings."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from titan_config import ConfigError, Configurable, cli
from titan_parallel import RoleTable
from titan_trainer import Profiler, TensorBoard, Validator, WarmupStableDecay
from titan_trainer.settings import Debug
from torch import nn

RATE = "The learning rate is 0 in steps"
ROUNDING = "Trained parameters are stored in"


@pytest.fixture
def warnings_of(run_ranks, toy_config, caplog):
    """`warnings_of(run, *all_changes)`: the log messages of each rank from `run(config)`, for each config."""

    def warnings_of(run, *all_changes, num_ranks: int = 1) -> list[list[list[str]]]:
        def collect():
            messages = []
            for changes in all_changes:
                caplog.clear()
                run(toy_config(**changes))
                messages.append([record.getMessage() for record in caplog.records])
            return messages

        return run_ranks(num_ranks, collect)

    return warnings_of


SCHEDULES = [
    ({"total_steps": 6}, "7 to 10. lr_scheduler.total_steps is 6, training.steps is 10."),
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


def test_steps_with_a_learning_rate_of_0_are_warned_about(warnings_of):
    def train(config):
        trainer = config.build()
        trainer.has_next_step = lambda: False
        trainer.train()

    schedules = [WarmupStableDecay.Config(**{"warmup_steps": 2, **settings}) for settings, _ in SCHEDULES]
    (messages,) = warnings_of(train, *({"lr_scheduler": schedule} for schedule in schedules))
    for schedule, (settings, idle_steps), lines in zip(schedules, SCHEDULES, messages, strict=True):
        warnings = [line for line in lines if line.startswith(RATE)]
        assert len(warnings) == (idle_steps is not None), settings
        if idle_steps:
            assert warnings[0].startswith(f"{RATE} {idle_steps}")
            assert "--lr_scheduler.total_steps to None or 10" in warnings[0]
        factors = [schedule.build(training_steps=10).factor(step) for step in range(10)]
        assert (0 in factors) == (idle_steps is not None)


def test_a_resumed_run_with_more_steps_prints_the_change_of_the_schedule(run_ranks, toy_config, toy, capfd, caplog):
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

    ((stretched, warnings),) = run_ranks(1, grow, None)
    printed = capfd.readouterr().out
    assert "the learning rate now decays until step 8; set --lr_scheduler.total_steps 4 to keep" in printed
    assert (stretched, warnings) == (pytest.approx(1 / 6), [])
    ((kept, warnings),) = run_ranks(1, grow, 4)
    assert "the learning rate now decays" not in capfd.readouterr().out
    assert kept == 0
    assert warnings[0].startswith(f"{RATE} 5 to 8. lr_scheduler.total_steps is 4, training.steps is 8.")


class CastAndFreeze(Configurable):
    """A converter that stores some parameters in another dtype, and freezes some."""

    class Config(Configurable.Config):
        dtype: torch.dtype
        names: list[str] = ["head.weight"]
        frozen: list[str] = []

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model: nn.Module, roles: RoleTable) -> RoleTable:
        for name in self.config.names:
            model.get_parameter(name).data = model.get_parameter(name).data.to(self.config.dtype)
        for name in self.config.frozen:
            model.get_parameter(name).requires_grad_(False)
        return roles

    def after_step(self, model: nn.Module) -> None: ...


def test_the_first_rank_warns_about_trained_16_bit_parameters(warnings_of, toy_config):
    changes = [
        {},
        {"training": copy.deepcopy(toy_config().training)},
        {"model_converters": [CastAndFreeze.Config(dtype=torch.float16)]},
        {"model_converters": [CastAndFreeze.Config(dtype=torch.bfloat16, frozen=["head.weight"])]},
    ]
    changes[1]["training"].dtype = "bfloat16"
    messages = warnings_of(lambda config: config.build(), *changes)[0]
    warnings = ["".join(line.partition(":")[0] for line in lines if ROUNDING in line) for lines in messages]
    all_parameters = "bfloat16 (4 on this rank, first embedding.weight)"
    one_parameter = "float16 (1 on this rank, first head.weight)"
    assert warnings == ["", f"{ROUNDING} {all_parameters}", f"{ROUNDING} {one_parameter}", ""]
    first, second = warnings_of(lambda config: config.build(), changes[1], num_ranks=2)
    assert [len([line for line in lines if ROUNDING in line]) for (lines,) in (first, second)] == [1, 0]


def test_bfloat16_norm_weights_stay_at_one_where_float32_ones_decay():
    """200 steps of AdamW at a learning rate of 1e-4 with weight decay, as the warning states."""
    weights = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        norm = nn.RMSNorm(16, dtype=dtype)
        optimizer = torch.optim.AdamW(norm.parameters(), lr=1e-4, weight_decay=0.1)
        for _ in range(200):
            norm(torch.randn(4, 16, dtype=dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights[dtype] = norm.weight.detach().float()
    assert torch.equal(weights[torch.bfloat16], torch.ones(16))
    assert (1 - weights[torch.float32]).min() > 0.01


class EndlessLoader(Configurable):
    class Config(Configurable.Config):
        infinite: bool = True


def test_an_endless_validation_is_rejected():
    for changes in ({"tokens": 3}, {"tokens": None, "dataloader": EndlessLoader.Config(infinite=False)}):
        Validator.Config(**{"dataloader": EndlessLoader.Config()} | changes).validate()
    with pytest.raises(
        ConfigError, match=r"validator\.tokens must be a number .*--validator\.dataloader\.infinite False"
    ):
        Validator.Config(dataloader=EndlessLoader.Config()).validate()


def test_a_long_validation_without_a_token_limit_logs_a_warning(toy, caplog):
    loader = toy.Loader.Config().build(tokenizer=None, seq_len=2, global_batch_size=1, local_batch_size=1, seed=0)
    dims = SimpleNamespace(dp_rank=0, dp_size=1)
    parallel = SimpleNamespace(dims=dims, evaluate=lambda batches, loss: (1.0, 1))
    validator = Validator.Config(dataloader=toy.Loader.Config()).build(loader=loader, parallel=parallel, loss=None)
    batch = loader.next_batches(0, 1)
    loader.next_batches = lambda rank, num_ranks: batch if loader.cursor < 10_001 else []
    assert validator.validate() == 1.0
    assert [record.getMessage() for record in caplog.records] == [
        "Validation has not finished after 10000 batches. Limit it: --validator.tokens."
    ]


def test_a_validation_ends_with_the_batch_that_reaches_its_tokens(toy):
    loader = toy.Loader.Config().build(tokenizer=None, seq_len=2, global_batch_size=1, local_batch_size=1, seed=0)
    dims = SimpleNamespace(dp_rank=0, dp_size=1)
    parallel = SimpleNamespace(dims=dims, evaluate=lambda batches, loss: (1.0, 7))
    config = Validator.Config(dataloader=toy.Loader.Config(), tokens=10)
    validator = config.build(loader=loader, parallel=parallel, loss=None)
    assert validator.validate() == 2 / 14


def test_a_validation_without_valid_targets_is_an_error(toy):
    loader = toy.Loader.Config().build(tokenizer=None, seq_len=2, global_batch_size=1, local_batch_size=1, seed=0)
    dims = SimpleNamespace(dp_rank=0, dp_size=1)
    parallel = SimpleNamespace(dims=dims, evaluate=lambda batches, loss: (0.0, 0))
    config = Validator.Config(dataloader=toy.Loader.Config(), tokens=10)
    validator = config.build(loader=loader, parallel=parallel, loss=None)
    with pytest.raises(ValueError, match="must fill at least one global batch, got no valid target in 10000 batches"):
        validator.validate()


def test_a_stopped_validation_returns_none(toy):
    loader = toy.Loader.Config().build(tokenizer=None, seq_len=2, global_batch_size=1, local_batch_size=1, seed=0)
    parallel = SimpleNamespace(dims=SimpleNamespace(dp_rank=0, dp_size=1), evaluate=lambda batches, loss: (1.0, 1))
    answers = iter([False, False, True])
    validator = Validator.Config(dataloader=toy.Loader.Config()).build(
        loader=loader, parallel=parallel, loss=None, is_stopped=lambda: next(answers)
    )
    assert validator.validate() is None
    assert loader.cursor == 2


@pytest.mark.parametrize("seed", [2**64, -1, 10**4000])
def test_seeds_outside_of_64_bits_are_rejected(toy_config, seed, capsys):
    with pytest.raises(ConfigError, match=r"debug\.seed must be from 0 to 2\*\*64 - 1, got"):
        toy_config(debug=Debug(seed=seed)).build()
    with pytest.raises(SystemExit):
        cli(toy_config(), ["--debug.seed", str(seed)])
    assert "debug.seed must be from 0" in capsys.readouterr().err
    cli(toy_config(), ["--debug.seed", str(2**64 - 1)])


@pytest.mark.parametrize("flag", ["--optimizer.lr", "--training.max_norm", "--lr_scheduler.min_lr_factor"])
def test_nan_and_infinite_settings_are_rejected(toy_config, flag, capsys):
    for number in (math.nan, math.inf):
        with pytest.raises(SystemExit):
            cli(toy_config(), [flag, str(number)])
        assert str(number) in capsys.readouterr().err


def test_remote_folders_are_rejected_and_no_folder_is_created(toy_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["--dump_folder", "s3://bucket/run"], ["--dump_folder=S3:/x"], ["--config", "gs://bucket/run.json"]):
        with pytest.raises(SystemExit) as end:
            cli(toy_config(), words)
        assert end.value.code == 2
        assert "must be a local path" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="dump_folder must be a local path"):
        toy_config(dump_folder=Path("s3://bucket/run"))
    for config in (Profiler.Config(save_traces_folder="s3://b"), TensorBoard.Config(folder="s3://b")):
        with pytest.raises(ConfigError, match="folder must be a local path, got s3://b"):
            config.validate()
    assert list(tmp_path.iterdir()) == []
