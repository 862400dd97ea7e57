"""`python -m trainctl.trainer.demo`: train the demo's GPT, alone or as one rank under torchrun."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainctl.trainer.demo.data import Corpus, LoaderConfig, NoData, WindowLoader, read_corpus, validation_batches
from trainctl.trainer.demo.model import GPT, ModelConfig
from trainctl.trainer.loop import Outcome, TrainConfig, train
from trainctl.trainer.parallel import process_group, world

# Layers, width, heads, context. "small" has 1.27 M parameters and steps in about 0.15 s on two CPU cores.
SIZES = {"small": (6, 128, 4, 128), "medium": (8, 160, 5, 256), "large": (10, 160, 5, 512)}
VALIDATION_BATCHES = 8
WARMUP_SHARE = 0.05
WARMUP_LIMIT = 100


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainctl.trainer.demo",
        description="Train a byte-level GPT on the sources of the Python standard library.",
    )
    add = parser.add_argument
    add("--name", default="gpt-stdlib", help="name of the run")
    add("--steps", type=int, default=2000, help="optimizer steps")
    add("--size", choices=sorted(SIZES), default="small", help="size of the model, 1.3 to 3.3 million parameters")
    add("--data", type=Path, metavar="DIR", help="train on the text files in DIR instead")
    add("--batch-size", type=int, default=4, help="windows in a micro-batch, on each rank")
    add("--accumulate", type=int, default=2, help="micro-batches in a step")
    add("--amp", choices=["bf16", "fp16", "off"], default="bf16", help="mixed precision")
    add("--sharding", choices=["ddp", "fsdp"], default="ddp", help="replicate the model, or shard it")
    add("--lr", type=float, default=2e-3, help="learning rate after the warm-up")
    add("--dropout", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--eval-every", type=int, default=50, metavar="STEPS")
    add("--checkpoint-every", type=int, default=100, metavar="STEPS")
    add("--ema", type=float, metavar="DECAY", help="keep a moving average of the weights")
    add("--patience", type=int, metavar="EVALUATIONS", help="stop when so many in a row bring no improvement")
    add("--restore-best", action="store_true", help="end with the weights of the best evaluation")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What there is to do, checked before any rank waits for another."""

    name: str
    config: TrainConfig
    shape: ModelConfig
    corpus: Corpus
    size: str
    batch_size: int


def prepare(options: argparse.Namespace) -> Job:
    """Check the options and read the data. Raises `ValueError`, `NoData` or `OSError`, each with what to do."""
    layers, width, heads, context = SIZES[options.size]
    config = TrainConfig(
        total_steps=options.steps,
        accumulate=options.accumulate,
        amp=options.amp,
        sharding=options.sharding,
        learning_rate=options.lr,
        warmup_steps=min(WARMUP_LIMIT, max(1, round(options.steps * WARMUP_SHARE))),
        clip=options.clip,
        eval_every=options.eval_every,
        checkpoint_every=options.checkpoint_every,
        patience=options.patience,
        restore_best=options.restore_best,
        ema_decay=options.ema,
        seed=options.seed,
    )
    shape = ModelConfig(layers=layers, width=width, heads=heads, context=context, dropout=options.dropout)
    LoaderConfig(context=context, batch_size=options.batch_size)
    corpus = read_corpus(options.data)
    return Job(
        name=options.name,
        config=config,
        shape=shape,
        corpus=corpus,
        size=options.size,
        batch_size=options.batch_size,
    )


def run(job: Job) -> Outcome:
    """Train as this rank of the launcher's job, or alone."""
    with process_group() as device:
        rank, world_size = world()
        cut = LoaderConfig(
            context=job.shape.context,
            batch_size=job.batch_size,
            seed=job.config.seed,
            rank=rank,
            world_size=world_size,
        )
        torch.manual_seed(job.config.seed)
        model = GPT(job.shape)
        return train(
            job.name,
            model=model,
            blocks=model.blocks,
            loader=WindowLoader(job.corpus.train, cut),
            validation=validation_batches(job.corpus.validation, cut, count=VALIDATION_BATCHES),
            config=job.config,
            device=device,
            described={
                "data": job.corpus.source,
                "size": job.size,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "batch_size": job.batch_size,
                "context": job.shape.context,
                "dropout": job.shape.dropout,
            },
        )


def main() -> int:
    options = parse()
    try:
        job = prepare(options)
    except (ValueError, NoData, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"the demo cannot train: {error}", file=sys.stderr)
        return 2
    run(job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
