"""`--generate`: text from the newest checkpoint of a run, without training.

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


def print_generated_text(recipe: Callable[[], Trainer.Config], argv: Sequence[str]) -> int:
    """Print the prompts in `argv`, continued by the model of `recipe`'s run; return the exit code: 0, or 2 on error.

    Under torchrun only rank 0 generates.
    """
    if os.environ.get("RANK", "0") != "0":
        return 0
    arguments, rest = parse_generation_arguments(argv)
    try:
        step, texts = generate_texts(cli(recipe, rest), arguments)
    except (ValueError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        return 2
    print(f"after step {step}:")
    for text in texts:
        print(f"\n{text}")
    return 0


def parse_generation_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the flags of generation from those of the recipe."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--generate", action="append", metavar="TEXT", required=True)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", "--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_known_args(argv)


def generate_texts(config: Trainer.Config, arguments: argparse.Namespace) -> tuple[int, list[str]]:
    """Return the step of the newest checkpoint, and each prompt followed by its generated continuation.

    A prompt is the beginning of a document (after `bos`, if the tokenizer has one); generation stops at `eos`. Raises
    ConfigError if the run has no tokenizer or no checkpoint, or its model no `generate`.
    """
    if not 0 <= arguments.seed < 2**64:
        raise ConfigError(f"--seed must be from 0 to 2**64 - 1, got {repr(arguments.seed)[:40]}.")
    tokenizer, step, model = _load(config)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = [[*begin, *map(int, tokenizer.encode(text))] for text in arguments.generate]
    stop = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    continuations = model.generate(
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        stop=stop,
        seed=arguments.seed,
    )
    return step, [_decode([*prompt, *ids], tokenizer) for prompt, ids in zip(prompts, continuations, strict=True)]


def _load(config: Trainer.Config) -> tuple[Tokenizer, int, Generator]:
    """Return the tokenizer of a run, the step of its newest checkpoint, and the model with those weights."""
    for name, section in (("tokenizer", config.tokenizer), ("checkpoint", config.checkpoint)):
        if section is None:
            raise ConfigError(f"{name} must be set for --generate, got None.")
    model, _, _ = model_on_meta(config)
    if not callable(getattr(model, "generate", None)):
        raise ConfigError(
            "model must have a method `generate` for --generate (see titan_trainer.protocols.Generator), got "
            f"{type(model).__qualname__}."
        )
    checkpoint: CheckpointConfig = config.checkpoint  # type: ignore[assignment]  # a recipe sets one
    to_empty(model, torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    step = checkpoint.read(config.dump_folder, {"model": ModelState(model)})
    if step is None:
        raise ConfigError(
            f"dump_folder must contain a checkpoint for --generate, got {config.dump_folder}. Train first, or set "
            "--dump_folder to the folder of a run."
        )
    return build_tokenizer(config), step, model


def _decode(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of `ids` without bos, eos, and ids that only the model's larger (padded) vocabulary has."""
    skipped = (tokenizer.bos_id, tokenizer.eos_id)
    return tokenizer.decode(id for id in ids if id not in skipped and id < tokenizer.vocab_size)
