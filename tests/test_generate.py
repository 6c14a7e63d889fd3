"""`--generate`: what a run has learned, from its newest checkpoint, in the words of its tokenizer."""

from __future__ import annotations

import pytest
from titan_ckpt import Checkpointer
from titan_models import Decoder
from titan_trainer import main

WORDS = ["--generate", "It is", "--generate=Mr. Darcy", "--max-new-tokens", "8"]


@pytest.fixture
def say(small_run, capsys):
    """`say("--generate", "It is")`: the exit code, what was printed, and what was said of errors."""
    config = small_run(changes={"training.steps": 3})
    config.checkpoint = Checkpointer.Config(async_mode="disabled")

    def say(*words):
        with pytest.raises(SystemExit) as end:
            main(lambda: config, words)
        return end.value.code, *capsys.readouterr()

    say.config = config
    return say


def test_a_run_says_what_it_has_learned(say, run_ranks, monkeypatch):
    config = say.config
    code, _, error = say(*WORDS)
    assert code == 2
    assert "dump_folder must contain a checkpoint" in error
    run_ranks(2, lambda: config.build().train())
    files = sorted((path, path.stat().st_mtime_ns) for path in config.dump_folder.rglob("*"))

    code, printed, _ = say(*WORDS)
    head, first, second = printed.split("\n\n", 2)
    assert (code, head) == (0, "after step 3:")
    assert first.startswith("It is") and len(first) > len("It is")
    assert second.startswith("Mr. Darcy")
    drawn = [say(*WORDS, "--temperature", "1.5", "--top_p", "0.9", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != printed
    assert sorted((path, path.stat().st_mtime_ns) for path in config.dump_folder.rglob("*")) == files

    for words, message in [
        (["--temperature", "0"], "temperature must be finite and > 0, got 0.0"),
        (["--seed", str(2**64)], f"--seed must be from 0 to 2**64 - 1, got {2**64}."),
        (["--tokenizer", "None"], "tokenizer must be set for --generate, got None"),
        (["--checkpoint", "None"], "checkpoint must be set for --generate, got None"),
        (["--model.vocab_size", "4096"], "model.embedding.weight"),
        (["--generate", ""], "at least one prompt"),
        (["--modell.dim", "32"], "modell"),
    ]:
        code, _, error = say(*WORDS, *words)
        assert code == 2, words
        assert message in error
    monkeypatch.delattr(Decoder, "generate")
    assert "model must have a method `generate` for --generate" in say(*WORDS)[2]


def test_the_continuation_is_that_of_the_model_in_hand(say, run_ranks):
    """Trained and asked in one process, its weights over two ranks."""
    config = say.config

    def train_and_ask():
        trainer = config.build()
        trainer.train()
        plain = config.model.build()
        weights = {name: tensor.full_tensor() for name, tensor in trainer.parts["model"].state_dict().items()}
        plain.load_state_dict(weights)
        prompt = trainer.tokenizer.encode("It is").tolist()
        return trainer.tokenizer.decode([*prompt, *plain.generate([prompt], max_new_tokens=8)[0]])

    expected = run_ranks(2, train_and_ask)[0]
    assert expected in say(*WORDS)[1]
