"""Custom callbacks, schedules and converters of a user, without a subclass of the Trainer."""

from __future__ import annotations

import json

import pytest
import torch
from titan_ckpt import Checkpointer
from titan_config import Configurable
from titan_models import Linear, Normal
from titan_parallel import check_parallel
from titan_parallel.check import meshes
from titan_trainer import Callback, Schedule


class RunLogger(Callback):
    """A logger in the manner of MLflow: it writes settings and metrics to a file of its own on the first rank."""

    class Config(Callback.Config):
        file: str = "log.jsonl"

    config: Config

    def on_step_begin(self, run):
        self.calls = ["begin"]

    def on_gradients_ready(self, run):
        self.calls.append("gradients")
        assert all(p.grad is not None for p in run.model.parameters())

    def on_validation_end(self, run, loss):
        self._write(run, {"validation_loss": loss})

    def on_step_end(self, run, record):
        assert self.calls == ["begin", "gradients"]
        seed = run.config.debug.seed
        self._write(run, {"step": record["step"], "loss": record["loss"], "seed": seed})

    def on_save(self, run, step):
        self._write(run, {"saved": step})

    def _write(self, run, line):
        if run.is_first_rank:
            with (run.config.dump_folder / self.config.file).open("a") as file:
                file.write(json.dumps(line) + "\n")


class AverageOfWeights(Callback):
    """An exponential moving average of the weights, which joins the checkpoint."""

    def setup(self, run):
        self.steps = 0
        self.average = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}

    def on_step_end(self, run, record):
        self.steps += 1
        for name, parameter in run.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.5)

    def state_dict(self):
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state):
        self.average, self.steps = dict(state["average"]), state["steps"]


class HalvedRate(Schedule):
    """A schedule without settings."""

    def factor(self, step):
        return 0.5


@pytest.fixture
def run_of(small_run):
    """`run_of(steps, **changes)`: the small run of llama3_debug up to `steps`, saved at each second step."""

    def config(steps, **changes):
        checkpoint = Checkpointer.Config(interval=2, async_mode="disabled")
        return small_run("run", {"training.steps": steps, "checkpoint": checkpoint, **changes})

    return config


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_custom_logger_sees_steps_and_saves(run_ranks, run_of):
    config = run_of(4, callbacks=[RunLogger.Config(file="mine.jsonl")])
    run_ranks(2, lambda: config.build().train())
    losses = [line["loss"] for line in lines_of(config.dump_folder / "metrics.jsonl")]
    mine = lines_of(config.dump_folder / "mine.jsonl")
    assert [line["loss"] for line in mine if "loss" in line] == losses
    assert [line["saved"] for line in mine if "saved" in line] == [2, 4]
    assert {line["seed"] for line in mine if "seed" in line} == {config.debug.seed}


def test_the_state_of_a_callback_is_saved_and_resumed(run_ranks, run_of):
    def trained(steps, folder):
        config = run_of(steps, callbacks=[AverageOfWeights.Config()])
        config.dump_folder = config.dump_folder.parent / folder
        trainer = config.build()
        trainer.train()
        assert trainer.callbacks[0].steps == steps
        return {
            name: getattr(average, "full_tensor", lambda average=average: average)()
            for name, average in trainer.callbacks[0].average.items()
        }

    (straight, _) = run_ranks(2, lambda: trained(4, "straight"))
    run_ranks(2, lambda: trained(2, "parts"))
    (resumed, _) = run_ranks(2, lambda: trained(4, "parts"))
    assert straight.keys() == resumed.keys() and len(straight) > 3
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_custom_schedule_needs_a_factor_alone(run_ranks, run_of):
    config = run_of(2, lr_scheduler=HalvedRate.Config())
    run_ranks(1, lambda: config.build().train())
    assert [line["lr"] for line in lines_of(config.dump_folder / "metrics.jsonl")] == [config.optimizer.lr / 2] * 2


class LowRankLinear(Linear):
    """`x W^T + x A^T B^T`: the weight keeps its name, beside `lora_a.weight` and `lora_b.weight`."""

    def forward(self, x):
        return super().forward(x) + self.lora_b(self.lora_a(x))


class LowRank(Configurable):
    """A converter that wraps the query projections (colwise) and the output projections (rowwise)."""

    class Config(Configurable.Config):
        rank: int = 4

    def __init__(self, config):
        self.rank = config.rank

    def convert(self, model, roles):
        table = dict(roles)
        small = Linear.Config(weight_init=Normal.Config(std=0.1))
        for layer in model.layers:
            for linear in (layer.attention.q_proj, layer.attention.o_proj):
                linear.lora_a = small.build(in_features=linear.in_features, out_features=self.rank)
                linear.lora_b = small.build(in_features=self.rank, out_features=linear.out_features)
                linear.__class__ = LowRankLinear
        table["layers.*.attention.q_proj.lora_b"] = roles["layers.*.attention.q_proj"]
        table["layers.*.attention.o_proj.lora_a"] = "rowwise"
        return table

    def after_step(self, model): ...


def test_a_converter_that_wraps_colwise_and_rowwise_linears_is_the_same_run(run_of):
    tables = []

    def build():
        with torch.device("meta"):
            model = run_of(1).model.build()
        tables.append(LowRank.Config().build().convert(model, model.roles()))
        model.to_empty(device="cpu").init_weights(seed=0)
        return model.double()

    build()
    assert tables[0]["layers.*.attention.q_proj.lora_b"] == tables[0]["layers.*.attention.q_proj"]
    report = check_parallel(build, meshes("fsdp2", "tp2", "tp2_sp"), roles=tables[0], steps=2)
    assert report.ok, report
    without = {name: role for name, role in tables[0].items() if not name.endswith("o_proj.lora_a")}
    assert not check_parallel(build, meshes("tp2"), roles=without, steps=1).ok  # what a converter leaves out is noticed


def test_a_converted_model_trains_alike_on_tensor_ranks(run_ranks, run_of):
    def losses(degree):
        config = run_of(4, model_converters=[LowRank.Config()], **{"parallelism.tensor_parallel_degree": degree})
        config.dump_folder = config.dump_folder.parent / str(degree)
        config.build().train()
        return [line["loss"] for line in lines_of(config.dump_folder / "metrics.jsonl")]

    (plain,), (split, _) = run_ranks(1, lambda: losses(1)), run_ranks(2, lambda: losses(2))
    assert split == pytest.approx(plain, rel=1e-4)
