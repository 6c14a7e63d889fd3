"""Memory after the meta device: what modules share stays one tensor, on one rank and on many."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from titan_parallel import ParallelDims, cross_entropy, parallelize, per_token, to_empty
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

transformers = pytest.importorskip("transformers", reason="builds models of transformers")


class Sharing(nn.Module):
    """A weight with two names in one module and a third in another, and a buffer with two."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.register_parameter("alias", self.first.weight)
        self.first.register_buffer("table", torch.zeros(3))
        self.second.register_buffer("table", self.first.table, persistent=False)


def test_parameters_and_buffers_that_are_shared_stay_shared():
    with torch.device("meta"):
        model = Sharing()
    assert to_empty(model, "cpu") is model
    assert model.first.weight is model.second.weight is model.first.alias
    assert model.first.table is model.second.table
    assert model.first.bias is not model.second.bias
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert len(list(model.parameters())) == 3


ROLES = {"model.embed_tokens": "embedding", "model.layers.*": "block", "lm_head": "head"}


def tied_llama():
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


@per_token
def loss(head, hidden, targets):
    return cross_entropy(head(hidden), targets["labels"]), (targets["labels"] != -100).sum()


def number_and_norm(small, state, degrees):
    """How many parameters a tied model of transformers has after it was given memory, and the norm of a step."""
    with torch.device("meta"):
        model = tied_llama()
    dims = ParallelDims.Config(**degrees).build(world_size=torch.distributed.get_world_size(), device_type="cpu")
    parallel = parallelize(model, ROLES, dims, output=attrgetter("logits"))
    parallel.to_empty("cpu")
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    for name, buffer in tied_llama().named_buffers():
        model.get_buffer(name).copy_(buffer)
    tokens = torch.randint(48, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs, targets = {"input_ids": tokens[:, :-1]}, {"labels": tokens[:, 1:]}
    batch = small.TextBatch(inputs, targets)
    parallel.forward_backward(small.micro_batches(batch, dims), loss, 16)
    return sum(p.numel() for p in model.parameters()), float(parallel.clip_grad_norm_(None))


def test_a_tied_model_of_transformers_is_the_same_model_on_one_rank_and_on_two(run_ranks, small):
    torch.manual_seed(0)
    plain = tied_llama()
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    number = sum(p.numel() for p in plain.parameters())

    (one,) = run_ranks(1, number_and_norm, small, state, {})
    for two in run_ranks(2, number_and_norm, small, state, {}):
        assert two[0] == one[0] == number
        assert two[1] == pytest.approx(one[1], rel=1e-5)
