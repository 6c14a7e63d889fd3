"""Objects of a plain PyTorch loop are parts: optimizers, schedulers, gradient scalers, wrapped and tied models."""

import random
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from titan_ckpt import Checkpointer, CheckpointError, TensorReader
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def build_model(width=6):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 2))


def build(folder, **settings):
    return Checkpointer.Config(interval=1, async_mode="disabled", **settings).build(dump_folder=folder)


def groups_of(model):
    decayed, rest = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    return [{"params": decayed, "weight_decay": 0.2}, {"params": rest, "lr": 3e-3, "weight_decay": 0.0}]


OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(groups_of(model), lr=1e-2, betas=(0.8, 0.9), amsgrad=True),
    "AdamW, lr a tensor": lambda model: torch.optim.AdamW(
        model.parameters(), lr=torch.tensor(1e-2), capturable=False, foreach=False
    ),
    "SGD": lambda model: torch.optim.SGD(groups_of(model), lr=1e-2),
    "SGD with momentum": lambda model: torch.optim.SGD(groups_of(model), lr=1e-2, momentum=0.9, nesterov=True),
    "Adagrad": lambda model: torch.optim.Adagrad(groups_of(model), lr=1e-2),
    "Adafactor": lambda model: torch.optim.Adafactor(groups_of(model), lr=1e-2),
    "RMSprop": lambda model: torch.optim.RMSprop(groups_of(model), lr=1e-2, momentum=0.5, centered=True),
    "NAdam": lambda model: torch.optim.NAdam(model.named_parameters(), lr=1e-2),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), lr=1e-2, history_size=3),
}


class Loop:
    """A plain PyTorch training loop; `steps` continues training, with different data in each step."""

    def __init__(self, build_optimizer, model):
        self.model = model
        self.optimizer = build_optimizer(model)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones=[2, 3], gamma=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.parts = {key: getattr(self, key) for key in ("model", "optimizer", "scheduler", "scaler")}

    def steps(self, first, last):
        for step in range(first, last + 1):
            data = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))

            def closure(data=data):
                self.optimizer.zero_grad()
                loss = self.model(data).square().mean()
                loss.backward()
                return loss

            self.optimizer.step(closure)
            self.scheduler.step()
            self.scaler.scale(torch.ones(()))
            self.scaler._found_inf_per_device = lambda optimizer: {}
        return self


def state_of(loop):
    weights = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    return weights, loop.optimizer.state_dict(), loop.scheduler.state_dict(), loop.scaler.state_dict()


def assert_equal(left, right):
    torch.testing.assert_close(left[0], right[0], rtol=0, atol=0)
    assert left[1]["param_groups"] == right[1]["param_groups"]
    assert left[2:] == right[2:]
    for one, other in zip(tensors_in(left[1]), tensors_in(right[1]), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value, key=str)]
    for item in value if isinstance(value, list) else ():
        yield from tensors_in(item)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_plain_torch_loop_equals_an_uninterrupted_one(tmp_path, name):
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(2, Loop(OPTIMIZERS[name], build_model()).steps(1, 2).parts)
        resumed = Loop(OPTIMIZERS[name], build_model())  # its optimizer has no state yet
        assert checkpointer.load(resumed.parts) == 2
    straight = Loop(OPTIMIZERS[name], build_model()).steps(1, 4)
    assert_equal(state_of(resumed.steps(3, 4)), state_of(straight))


def test_an_optimizer_with_other_groups_is_rejected_before_any_weight_changes(tmp_path):
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(2, Loop(OPTIMIZERS["SGD"], build_model()).steps(1, 2).parts)
        other = Loop(lambda model: torch.optim.SGD(model.parameters(), lr=1e-2), build_model())
        before = other.model[0].weight.clone()
        with pytest.raises(CheckpointError, match=r"saved with \(2\), got 1, and 2 parameters in another one or none"):
            checkpointer.load(other.parts)
    assert torch.equal(other.model[0].weight, before)


def test_optimizer_state_follows_the_names_of_parameters(tmp_path):
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, Loop(OPTIMIZERS["SGD with momentum"], build_model()).steps(1, 1).parts)
        with TensorReader(tmp_path / "checkpoint" / "step-1") as reader:
            assert "optimizer.state.model.0.weight.momentum_buffer" in reader.index
        turned = Loop(OPTIMIZERS["SGD with momentum"], build_model())
        for group in turned.optimizer.param_groups:
            group["params"].reverse()
        checkpointer.load(turned.parts)
    straight = Loop(OPTIMIZERS["SGD with momentum"], build_model()).steps(1, 1)
    for ours, plain in zip(turned.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(
            turned.optimizer.state[ours]["momentum_buffer"], straight.optimizer.state[plain]["momentum_buffer"]
        )


def test_float32_state_beside_bfloat16_weights_is_not_rounded(tmp_path):
    class Kept(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter] = {"exact": torch.full(parameter.shape, 0.1), "note": (2, 1)}

    model = nn.Linear(2, 2).to(torch.bfloat16)
    saved, fresh = Kept(model.parameters()), Kept(model.parameters())
    saved.step()
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": saved})
        checkpointer.load({"model": model, "optimizer": fresh})
    assert torch.equal(fresh.state[model.weight]["exact"], torch.full((2, 2), 0.1))
    assert fresh.state[model.weight]["note"] == (2, 1)


def wrapped(kind):
    model = build_model()
    if kind == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if kind == "ddp":
        return DistributedDataParallel(model)
    return torch.compile(model, backend="eager") if kind == "compiled" else model


def test_wrapped_models_and_their_optimizers_load_each_others_checkpoints(run_ranks, tmp_path):
    kinds = ["plain", "ddp", "fsdp", "compiled"]

    def loop_on(kind, steps):
        model = wrapped(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(steps):
            model(torch.full((2, 6), step + 1.0)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"model": model, "optimizer": optimizer}

    def numbers(parts):
        states = [parts["optimizer"].state[parameter]["exp_avg"] for parameter in parts["model"].parameters()]
        tensors = [*parts["model"].parameters(), *states]
        return [(t.full_tensor() if isinstance(t, DTensor) else t).tolist() for t in tensors]

    def save_all():
        result = {}
        for kind in kinds:
            parts = loop_on(kind, 2)
            with closing(build(tmp_path / kind)) as checkpointer:
                checkpointer.save(1, parts)
            result[kind] = numbers(parts)
        return result

    def load_all():
        result = {}
        for saved, kind in [("plain", "ddp"), ("ddp", "fsdp"), ("fsdp", "compiled"), ("compiled", "plain")]:
            parts = loop_on(kind, 0)
            with closing(build(tmp_path / saved)) as checkpointer:
                assert checkpointer.load(parts) == 1
            result[saved] = numbers(parts)
        return result

    saved = run_ranks(2, save_all)[0]
    for world_size in (1, 2):
        for loaded in run_ranks(world_size, load_all):
            assert loaded == saved


def test_a_wrapped_model_is_initialized_from_another_run(run_ranks, tmp_path):
    with closing(build(tmp_path / "old")) as checkpointer:
        checkpointer.save(1, {"model": build_model()})

    def begin():
        model = wrapped("ddp")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        with closing(build(tmp_path / "new", initial_load_path=tmp_path / "old/checkpoint/step-1")) as checkpointer:
            assert checkpointer.load({"model": model}) is None
        return model.module[0].weight.tolist()

    for weight in run_ranks(2, begin):
        assert weight == build_model()[0].weight.tolist()


class Holder:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_states_of_loaders_and_generators_are_restored_exactly(tmp_path):
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "gpus": [torch.arange(3, dtype=torch.uint8), {"x": (torch.ones(2),)}],
        "workers": {0: {"seen": {1, 2}, "cursor": b"\x00\x01"}, 1: None},
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "scalar": np.int64(4),
        "float": np.float64(0.1),
        "time": np.datetime64("2026-01-02"),
    }
    fresh = Holder(
        {
            **state,
            "torch": torch.zeros_like(state["torch"]),
            "gpus": [torch.zeros(3, dtype=torch.uint8), {"x": (torch.zeros(2),)}],
        }
    )
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, {"loader": Holder(state)})
        checkpointer.load({"loader": fresh})
    assert {key: repr(value) for key, value in fresh.state.items()} == {
        key: repr(value) for key, value in state.items()
    }
    assert fresh.state["python"] == state["python"]
    assert np.array_equal(fresh.state["numpy"][1], state["numpy"][1])
    assert fresh.state["array"].dtype == np.int16
    assert torch.equal(fresh.state["torch"], state["torch"])


def test_tied_weights_stay_tied_and_are_loaded(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def tied():
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config)

    def step(model, optimizer):
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    saved, loaded = tied(), tied()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (saved, loaded)]
    step(saved, optimizers[0])
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, {"model": saved, "optimizer": optimizers[0]})
        checkpointer.load({"model": loaded, "optimizer": optimizers[1]})
    for model, optimizer in zip((saved, loaded), optimizers, strict=True):
        step(model, optimizer)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


KINDS = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters()),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("saved", KINDS)
def test_the_state_of_another_optimizer_is_rejected_before_any_weight_changes(tmp_path, saved):
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, Loop(KINDS[saved], build_model()).steps(1, 1).parts)
        for kind in KINDS.keys() - {saved}:
            other = Loop(KINDS[kind], build_model())
            before = state_of(other)
            with pytest.raises(CheckpointError, match=rf"it was saved with \({saved}\), got {kind}\."):
                checkpointer.load(other.parts)
            assert_equal(state_of(other), before)


def test_a_part_that_is_not_an_optimizer_is_rejected_for_an_optimizer(tmp_path):
    model = build_model()
    with closing(build(tmp_path)) as checkpointer:
        checkpointer.save(1, {"model": model, "optimizer": Holder({"lr": 0.1})})
        with pytest.raises(CheckpointError, match=r"for AdamW must be that of a torch optimizer, got .* keys lr\."):
            checkpointer.load({"model": model, "optimizer": torch.optim.AdamW(model.parameters())})
