"""Weights come from Hugging Face's files, and go there, without the model being in memory twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from titan_ckpt import Checkpointer, load_hf
from titan_config import to_dict
from titan_models import Decoder
from titan_models.llama3 import llama3_debug
from titan_models.llama4 import llama4_debug
from titan_models.qwen3 import qwen3_moe_debug

MEGABYTE = 10**6
LARGEST_PIECE = 17 * MEGABYTE  # the embedding is half of that; gate and up of Llama 4's experts, one tensor there

CHILD = """
import json, sys
from pathlib import Path
import torch
from titan_ckpt import export_hf, load_hf, save_hf
from titan_config import from_dict

def num_bytes(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])

def extra(action, *arguments):
    before = num_bytes("VmRSS")
    action(*arguments)
    print(action.__name__, num_bytes("VmHWM") - before)

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = from_dict(json.loads((folder / "config.json").read_text()))
adapter = config.hf_adapter()
extra(export_hf, folder / "checkpoint" / "step-1", folder / "exported", None, adapter)
model = config.build()  # of NaNs: all of its memory is there, and the most that there was so far
extra(load_hf, folder / "exported", model.state_dict(), adapter)
extra(save_hf, model.state_dict(), adapter, folder / "saved")
"""


def dense() -> Decoder.Config:
    config = llama3_debug()
    config.num_layers, config.vocab_size, config.dim, config.block.feed_forward.hidden_dim = 12, 4096, 512, 2048
    return config


def experts_apart() -> Decoder.Config:
    config = qwen3_moe_debug()
    config.num_layers, config.vocab_size, config.dim = 14, 4096, 512
    return config


def experts_fused() -> Decoder.Config:
    config = llama4_debug()
    config.num_layers, config.vocab_size, config.dim = 14, 4096, 512
    return config


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    "flavor",
    [pytest.param(dense, marks=pytest.mark.full), pytest.param(experts_apart, marks=pytest.mark.full), experts_fused],
)
def test_the_model_is_never_in_memory_twice(flavor, tmp_path: Path) -> None:
    """Models of 200 MB. Beside them a process holds a few tensors."""
    config = flavor()
    assert 190 * MEGABYTE < 4 * config.num_parameters() < 280 * MEGABYTE
    model = config.build()
    model.init_weights(seed=0)
    checkpointer = Checkpointer.Config(async_mode="disabled").build(dump_folder=tmp_path)
    checkpointer.save(1, {"model": model}, last=True)
    checkpointer.close()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    extra = dict(line.split() for line in done.stdout.splitlines())
    assert extra.keys() == {"export_hf", "load_hf", "save_hf"}
    assert int(extra["load_hf"]) < 2 * LARGEST_PIECE
    assert max(map(int, extra.values())) < 6 * LARGEST_PIECE  # own ones, joined, turned, and what malloc keeps
    for folder in ("exported", "saved"):
        again = config.build()
        load_hf(tmp_path / folder, again.state_dict(), config.hf_adapter())
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
