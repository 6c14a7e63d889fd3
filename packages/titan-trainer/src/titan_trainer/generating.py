"""`--generate`: what a run has learned so far, by its newest checkpoint, without going on with it.

python recipes/llama3_debug.py --generate "It is a truth" [--generate ...] [--max-new-tokens 64]
    [--temperature 0.8] [--top-p 0.95] [--seed 0] [any flag of the recipe]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch
from titan_config import ConfigError, cli
from titan_parallel import to_empty

from titan_trainer.model_state import ModelState
from titan_trainer.protocols import CheckpointConfig, Generator, Tokenizer
from titan_trainer.trainer import Trainer, build_tokenizer, model_on_meta


def print_continuations(recipe: Callable[[], Trainer.Config], words: Sequence[str]) -> int:
    """Print what the run of `recipe`, as changed by `words`, makes of prompts; return 0, 2 if it cannot."""
    if os.environ.get("RANK", "0") != "0":
        return 0  # of the processes that torchrun starts with the same words, one speaks
    arguments, rest = read_words(words)
    try:
        step, texts = continuations_of(cli(recipe, rest), arguments)
    except (ValueError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        return 2
    print(f"after step {step}:")
    for text in texts:
        print(f"\n{text}")
    return 0


def read_words(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags that are about generating, and the words that are the recipe's."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--generate", action="append", metavar="TEXT", required=True)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", "--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_known_args(words)


def continuations_of(config: Trainer.Config, arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """The step of the newest checkpoint, and each prompt with what its model continues it with, as text.

    A prompt begins as a document, and its continuation ends where the document does. Raises ConfigError where the run
    has nothing to generate with.
    """
    if not 0 <= arguments.seed < 2**64:
        raise ConfigError(f"--seed must be from 0 to 2**64 - 1, got {repr(arguments.seed)[:40]}.")
    tokenizer, step, model = _load(config)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = [[*begin, *map(int, tokenizer.encode(text))] for text in arguments.generate]
    stop = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = model.generate(
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        stop=stop,
        seed=arguments.seed,
    )
    return step, [_text_of([*prompt, *row], tokenizer) for prompt, row in zip(prompts, rows, strict=True)]


def _load(config: Trainer.Config) -> tuple[Tokenizer, int, Generator]:
    """The tokenizer of a run, the step of its newest checkpoint, and the model with the weights of that."""
    for name, got in (("tokenizer", config.tokenizer), ("checkpoint", config.checkpoint)):
        if got is None:
            raise ConfigError(
                f"Got a run without a {name}. Text is continued by a tokenizer, and by a model that was saved. "
                f"Set --{name}."
            )
    model, _ = model_on_meta(config)
    if not callable(getattr(model, "generate", None)):
        raise ConfigError(
            f"Got the model {type(model).__qualname__}, which has no generate. It is asked to continue token ids. Give "
            "it the method, as titan_trainer.protocols.Generator states it."
        )
    checkpoint: CheckpointConfig = config.checkpoint  # type: ignore[assignment]  # the recipe's promise
    to_empty(model, torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    step = checkpoint.read(config.dump_folder, {"model": ModelState(model)})
    if step is None:
        raise ConfigError(
            f"Got dump_folder {config.dump_folder}, in which there is no checkpoint. A model is read from one. Train "
            "first, or set --dump_folder to the folder of a run."
        )
    return build_tokenizer(config), step, model


def _text_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text without its borders, and without ids beyond the tokenizer's, which a model may have."""
    borders = (tokenizer.bos_id, tokenizer.eos_id)
    return tokenizer.decode(id for id in ids if id not in borders and id < tokenizer.vocab_size)
