"""Command line: ``python -m models fit|evaluate|report|demo``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from models.evaluation import summarise, table
from models.experiment import compare, evaluate_run, find_runs, write_report
from models.runs import MODELS, PRESETS, RunConfig, load_data
from models.training import fit

DEMO = RunConfig(
    data="digits",
    epochs=20,
    batch_size=64,
    lr=5e-4,
    hidden=256,
    feature_dim=64,
    encoder_layers=1,
    critic_hidden=128,
)
DEMO_MODELS = ("factorcl-sup", "simclr", "supcon", "cross-self")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m models", description="Factorized multimodal models.")
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("fit", help="train one model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    default = RunConfig()
    train.add_argument("--model", choices=MODELS, default=default.model)
    train.add_argument("--data", default=default.data, help="digits, synthetic, utd-mhad or FILE.npz")
    train.add_argument("--modalities", type=_pair, help="two array names of FILE.npz, as A,B")
    train.add_argument("--epochs", type=int, default=default.epochs)
    train.add_argument("--batch-size", type=int, default=default.batch_size)
    train.add_argument("--seed", type=int, default=default.seed, help="decides weights, batches and drawn splits")
    train.add_argument("--lr", type=float, default=default.lr, help="Adam's step size")
    train.add_argument("--inner-steps", type=int, default=default.inner_steps, help="CLUB critic steps per batch")
    train.add_argument("--hidden", type=int, default=default.hidden, help="width of the encoders")
    train.add_argument("--feature-dim", type=int, default=default.feature_dim, help="width of their outputs")
    train.add_argument(
        "--encoder-layers", type=int, default=default.encoder_layers, help="of vectors: hidden layers - 1"
    )
    train.add_argument("--stride", type=int, default=default.stride, help="of sequences: average this many frames")
    train.add_argument("--critic-hidden", type=int, default=default.critic_hidden)
    train.add_argument("--temperature", type=float, default=default.temperature, help="of the baselines")
    train.add_argument("--preset", choices=PRESETS, default=default.preset, help="FactorCL where paper and code differ")
    train.add_argument("--augmentation", choices=("unique", "independent"), default=default.augmentation)
    train.add_argument("--resume", action="store_true", help="go on from OUT/last.ckpt")
    for name, text in (
        ("evaluate", "linear probes of trained runs"),
        ("report", "write OUT/report.html"),
        ("demo", "train FactorCL-SUP and its baselines on digits, three seeds"),
    ):
        commands.add_parser(name, help=text)
    for command in commands.choices.values():
        command.add_argument(
            "--out", type=Path, default=Path("runs/demo" if command.prog.endswith("demo") else "runs/run")
        )
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    commands.choices["demo"].add_argument("--epochs", type=int, default=DEMO.epochs)
    commands.choices["demo"].add_argument("--seeds", type=int, default=3, help="number of seeds")
    return top


def _pair(text: str) -> tuple[str, str]:
    names = text.split(",")
    if len(names) != 2 or not all(names):
        raise argparse.ArgumentTypeError(f"expected two names as A,B; got {text!r}")
    return names[0], names[1]


def run_fit(args: argparse.Namespace) -> str:
    config = RunConfig(**{f.name: getattr(args, f.name) for f in fields(RunConfig)})
    module = fit(config, load_data(config), args.out, resume=args.resume, progress=not args.quiet)
    return f"trained {config.model} on {config.data} for {module.current_epoch} epochs: {args.out}/last.ckpt"


def run_evaluate(args: argparse.Namespace) -> str:
    results = [evaluate_run(folder) for folder in find_runs(args.out)]
    print(table(summarise(results)))
    return f"evaluated {len(results)} run{'s' * (len(results) > 1)} below {args.out}"


def run_report(args: argparse.Namespace) -> str:
    print(table(write_report(args.out)))
    return f"wrote {args.out}/report.html"


def run_demo(args: argparse.Namespace) -> str:
    if args.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {args.seeds}")
    start = time.monotonic()
    base = RunConfig(**{f.name: getattr(DEMO, f.name) for f in fields(DEMO)} | {"epochs": args.epochs})
    compare(base, DEMO_MODELS, range(args.seeds), args.out, progress=not args.quiet)
    print(table(write_report(args.out)))
    return f"demo done in {time.monotonic() - start:.0f} s: open {args.out}/report.html"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    commands = {"fit": run_fit, "evaluate": run_evaluate, "report": run_report, "demo": run_demo}
    try:
        print(commands[args.command](args))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; go on with: python -m models fit ... --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
