"""Trains language models and fine-tunes one, in about three minutes on an H100, for the filter's benchmarks.

    python bench/train_lm.py --out /tmp/lm --prepare-only   # text and tokens: CPU only, about a minute
    python bench/train_lm.py --out /tmp/lm                  # base.pt, base-tuned.pt, small.pt; makes missing tokens

The text is what lies on the machine: sources of installed packages, headers, documentation. Models are pre-trained on
everything but one kind of it (``--tune``); the first of them is then fine-tuned on that kind, at a low rate. Written
are, for ``torch.load``: hidden states e (N, D) bf16 and targets (N,) of text the model has not seen, the head c (V, D)
bf16, unigram counts (V,) of the text it was trained on last, and facts about the run. The loss is exact, so that no
filter has shaped what a filter is measured on.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bpe
import corpus
import lm
import lm_training
import numpy as np
import torch
from lm_training import Plan

#: Width and layers of the models that have a name; another one is called by them, as 512x4.
MODELS = {"small": (384, 6), "base": (768, 8), "large": (1024, 12)}
TUNE_RATE = 0.1  # of the pre-training's


def main(argv: list[str] | None = None) -> None:
    """Text, tokens, trainings, files."""
    options = parse(argv)
    start = time.perf_counter()
    roots = tuple(str(path.resolve()) for path in options.roots or corpus.default_roots())
    domain_tokens = options.tune_steps * options.tune_batch * options.context if options.tune else 0
    recipe = bpe.Recipe(roots, options.tokens, options.vocab, options.tune, domain_tokens, options.seed)
    ids = bpe.load_or_prepare(recipe, options.out)
    print(f"tokens ready after {time.perf_counter() - start:.0f} s", flush=True)
    if options.prepare_only:
        return
    for held_out in (ids.held_out, *([ids.domain_held_out] if options.tune else [])):
        lm_training.enough_held_out(held_out, options.context, options.keep)
    for number, (name, seconds) in enumerate(zip(options.models, options.seconds, strict=True)):
        print(f"{name}, after {time.perf_counter() - start:.0f} s:", flush=True)
        model = pre_trained(name, seconds, ids, options)
        if options.tune and number == 0:
            print(f"{name}-tuned, after {time.perf_counter() - start:.0f} s:", flush=True)
            fine_tuned(name, model, ids, options)
        del model
    print(f"{time.perf_counter() - start:.0f} s in all")


def pre_trained(name: str, seconds: float | None, ids: bpe.TokenIds, options: argparse.Namespace) -> lm.LanguageModel:
    """A model trained on the general text; its file is written."""
    width, layers = sizes_of(name)
    sizes = lm.Sizes(vocab=options.vocab, width=width, layers=layers, context=options.context)
    torch.manual_seed(options.seed)
    model = lm.LanguageModel(sizes).to(options.device)
    steps = options.steps or math.ceil(options.tokens / (options.batch * options.context))
    plan = Plan(steps, seconds, options.batch, options.rate, options.backend, options.seed)
    facts = lm_training.train(model, ids.training, options.context, plan)
    write(name, model, ids.training, ids.held_out, options, facts | ids.facts)
    return model


def fine_tuned(name: str, model: lm.LanguageModel, ids: bpe.TokenIds, options: argparse.Namespace) -> None:
    """The same model, trained on with the text of the domain; its file is written."""
    before, _ = held_out(model, ids.domain_held_out, options)
    rate = TUNE_RATE * options.rate
    plan = Plan(options.tune_steps, None, options.tune_batch, rate, options.backend, options.seed)
    facts = lm_training.train(model, ids.domain, options.context, plan)
    facts |= {"tuned_from": name, "held_out_loss_before": before}
    write(f"{name}-tuned", model, ids.domain, ids.domain_held_out, options, facts | ids.facts)


def held_out(model: lm.LanguageModel, ids: bpe.Ids, options: argparse.Namespace) -> tuple[float, dict[str, Any]]:
    return lm_training.held_out(model, ids, options.context, options.keep, options.backend, options.seed)


def write(
    name: str,
    model: lm.LanguageModel,
    training: bpe.Ids,
    unseen: bpe.Ids,
    options: argparse.Namespace,
    facts: dict[str, Any],
) -> None:
    """What the benchmarks read: ``NAME.pt``."""
    loss, kept = held_out(model, unseen, options)
    facts = {"name": name, "held_out_loss": loss, **asdict(model.sizes), **facts, "torch": str(torch.__version__)}
    counts = torch.from_numpy(np.bincount(training, minlength=options.vocab))
    path = options.out / f"{name}.pt"
    torch.save({**kept, "unigram_counts": counts, "facts": facts}, path)
    print(f"held-out loss {loss:.3f}; {path}", flush=True)


def sizes_of(name: str) -> tuple[int, int]:
    """Width and layers of a model.

    >>> sizes_of("base"), sizes_of("512x4")
    ((768, 8), (512, 4))
    """
    if name in MODELS:
        return MODELS[name]
    sizes = name.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"got {name!r}, expected WIDTHxLAYERS or one of {', '.join(MODELS)}")
    return int(sizes[0]), int(sizes[1])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results and the tokens")
    parser.add_argument("--models", type=_model, nargs="+", default=["base", "small"], help="small, base, large or WxL")
    parser.add_argument("--seconds", type=_seconds, nargs="+", help="limit of each pre-training; one or one each")
    parser.add_argument("--tune", choices=[*corpus.DOMAINS, "none"], default="documentation", help="of the first model")
    parser.add_argument("--tune-steps", type=int, default=300)
    parser.add_argument("--tune-batch", type=int, default=8, help="sequences a step of fine-tuning")
    parser.add_argument("--roots", type=Path, nargs="+", help="folders of text; default: packages, headers, docs")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="of pre-training")
    parser.add_argument("--prepare-only", action="store_true", help="make the tokens, do not train")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="of the loss; default: triton on a GPU, torch elsewhere")
    parser.add_argument("--steps", type=int, help="default: as many as see --tokens tokens")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate at its peak")
    parser.add_argument("--keep", type=int, default=16_384, help="held-out tokens whose hidden states are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=lm.Sizes.vocab)
    parser.add_argument("--context", type=int, default=lm.Sizes.context, help="tokens of a sequence")
    options = parser.parse_args(argv)
    options.backend = options.backend or ("triton" if options.device.type == "cuda" else "torch")
    options.tune = None if options.tune == "none" else options.tune
    given = options.seconds or [None]
    options.seconds = given * len(options.models) if len(given) == 1 else given
    if len(options.seconds) != len(options.models) or len(set(options.models)) != len(options.models):
        parser.error("--models: expected different names, and --seconds as many numbers as models, or one")
    return options


def _model(name: str) -> str:
    sizes_of(name)
    return name


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds, more than 0")
    return value


if __name__ == "__main__":
    main()
