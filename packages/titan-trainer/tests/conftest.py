"""Toy classes for the trainer's protocols: a tiny model, a loader of a known sequence, a checkpointer in memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from titan_config import Configurable
from titan_trainer import AdamW, Metrics, Trainer, Training, WarmupStableDecay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

VOCAB = 16


class Model(Configurable, nn.Module):
    """Embedding, one residual block, head."""

    class Config(Configurable.Config):
        vocab_size: int = VOCAB
        width: int = 8

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([nn.Linear(config.width, config.width)])
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return self.head(hidden)

    def roles(self) -> dict:
        return {"embedding": "embedding", "layers.*": "block", "head": "head"}

    def init_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                whole = torch.randn(parameter.shape, generator=generator) * 0.3
                if isinstance(parameter, DTensor):
                    whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                parameter.copy_(whole)


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    sample_ids: list[list[int]]
    sequence_dims: dict[str, int] = field(default_factory=lambda: {"tokens": 1, "labels": 1})


class Loader(Configurable):
    """Sample n of the run counts upwards from n, modulo the vocabulary, so that the next token can be learned."""

    class Config(Configurable.Config):
        num_samples: int | None = None

    def __init__(self, config: Config, *, tokenizer, seq_len, global_batch_size, local_batch_size, seed) -> None:
        self.config, self.seq_len, self.global_batch_size, self.local_batch_size = (
            config,
            seq_len,
            global_batch_size,
            local_batch_size,
        )
        self.cursor, self.num_read = 0, 0
        self.samples_read: list[int] = []

    def next_batches(self, rank: int, num_ranks: int) -> list[Batch]:
        if self.config.num_samples is not None and self.cursor + self.global_batch_size > self.config.num_samples:
            self.num_read = 0
            return []
        share = self.global_batch_size // num_ranks
        samples = [self.cursor + rank * share + i for i in range(share)]
        self.samples_read += samples
        self.num_read = share
        return [self._batch(samples[i : i + self.local_batch_size]) for i in range(0, share, self.local_batch_size)]

    def _batch(self, samples: list[int]) -> Batch:
        text = (torch.tensor(samples)[:, None] + torch.arange(self.seq_len + 1)) % VOCAB
        labels = text[:, 1:].clone()
        for i, sample in enumerate(samples):
            labels[i, : sample % 3] = -100  # uneven counts of valid targets
        return Batch({"tokens": text[:, :-1]}, {"labels": labels}, [[sample] for sample in samples])

    def cursor_delta(self) -> Tensor:
        return torch.tensor([self.num_read])

    def commit(self, cursor_delta: Tensor) -> None:
        self.cursor += int(cursor_delta)

    def rollback(self) -> None:
        self.num_read = 0

    def state_dict(self) -> dict:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict) -> None:
        self.cursor = state["cursor"]


class Checkpointer(Configurable):
    """Keeps copies of the parts' states in this process, by dump folder."""

    class Config(Configurable.Config):
        interval: int = 5

    saved: dict = {}

    def __init__(self, own: Config, /, *, dump_folder, config) -> None:
        self.interval, self.key = own.interval, str(dump_folder)

    def load(self, parts) -> int | None:
        if self.key not in self.saved:
            return None
        step, states = self.saved[self.key]
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(states[name]))
        return step

    def save(self, step, parts, *, last: bool = False) -> bool:
        if not (last or step % self.interval == 0):
            return False
        self.saved[self.key] = (step, {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})
        return True

    def close(self) -> None: ...


@pytest.fixture
def toy():
    """The classes above: `toy.Model`, `toy.Loader`, `toy.Checkpointer`."""
    return SimpleNamespace(Model=Model, Loader=Loader, Checkpointer=Checkpointer)


@pytest.fixture
def toy_config(tmp_path):
    """A function that returns the config of a run of ten steps; keyword arguments replace its fields."""

    def config(**changes) -> Trainer.Config:
        values = {
            "model": Model.Config(),
            "dataloader": Loader.Config(),
            "training": Training(
                global_batch_size=8, local_batch_size=2, seq_len=12, steps=10, mixed_precision_param="float32"
            ),
            "optimizer": AdamW.Config(lr=3e-2),
            "lr_scheduler": WarmupStableDecay.Config(warmup_steps=2, total_steps=20),
            "metrics": Metrics.Config(log_freq=5),
            "dump_folder": tmp_path / "run",
        }
        return Trainer.Config(**(values | changes))

    return config
