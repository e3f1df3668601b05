"""Command line: ``python -m models fit|compare|evaluate|report|demo``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from models.compare import compare, save
from models.defaults import defaults
from models.evaluation import summarise, table
from models.experiment import evaluate_run, find_runs, write_report
from models.runs import CHOICES, MODELS, RunConfig, load_data
from models.training import fit

DEMO_MODELS = ("factorcl-sup", "simclr", "supcon", "cross-self")
SETTINGS: dict[str, tuple[type, str]] = {
    "epochs": (int, "passes over the training rows"),
    "batch_size": (int, "rows of a batch"),
    "lr": (float, "Adam's step size"),
    "weight_decay": (float, "AdamW's"),
    "dropout": (float, "of the encoders"),
    "input_noise": (float, "deviation of noise on the inputs in training"),
    "inner_steps": (int, "CLUB critic steps per batch"),
    "hidden": (int, "width of the encoders"),
    "feature_dim": (int, "width of their outputs"),
    "encoder_layers": (int, "of vectors: hidden layers - 1"),
    "stride": (int, "of sequences: average this many frames"),
    "segments": (int, "of sequences: equal parts with statistics of their own"),
    "critic_hidden": (int, "width of FactorCL's critics"),
    "head_layers": (int, "hidden layers of the heads - 1"),
    "temperature": (float, "of the baselines"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m models", description="Factorized multimodal models.")
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("fit", help="train one model")
    train.add_argument("--model", choices=MODELS, default="factorcl-sup")
    train.add_argument("--seed", type=int, default=0, help="decides weights, batches and drawn splits")
    train.add_argument("--resume", action="store_true", help="go on from OUT/last.ckpt")
    many = commands.add_parser("compare", help="search settings on validation rows, then train over several seeds")
    many.add_argument("--models", type=_models, default=DEMO_MODELS, help=f"some of {','.join(MODELS)}")
    many.add_argument("--trials", type=int, default=0, help="settings tried per model; 0: the settings given here")
    many.add_argument("--json", type=Path, help="write the results here as well")
    for command in (train, many):
        _add_settings(command)
    commands.add_parser("evaluate", help="linear probes of trained runs")
    commands.add_parser("report", help="write OUT/report.html")
    demo = commands.add_parser("demo", help="train FactorCL-SUP and its baselines on digits, three seeds")
    demo.add_argument("--epochs", type=int, default=defaults("digits").epochs)
    for command in (many, demo):
        command.add_argument("--seeds", type=int, default=3, help="number of seeds")
    for name, command in commands.choices.items():
        folder = Path("runs") / (name if name in ("demo", "compare") else "run")
        command.add_argument("--out", type=Path, default=folder)
        command.add_argument("--quiet", action="store_true", help="no progress bar")
    return top


def _add_settings(command: argparse.ArgumentParser) -> None:
    """Data and settings; a setting that is not given keeps what models/defaults.py has for the data."""
    absent = argparse.SUPPRESS
    command.add_argument("--data", default="digits", help="digits, synthetic, utd-mhad or FILE.npz")
    command.add_argument("--modalities", type=_pair, default=absent, help="two array names of FILE.npz, as A,B")
    for name, (kind, text) in SETTINGS.items():
        command.add_argument("--" + name.replace("_", "-"), type=kind, default=absent, help=text)
    for name, values in CHOICES.items():
        command.add_argument("--" + name.replace("_", "-"), choices=values, default=absent)


def _config(args: argparse.Namespace) -> RunConfig:
    given = {f.name: getattr(args, f.name) for f in fields(RunConfig) if hasattr(args, f.name)}
    return replace(defaults(args.data), **given)


def _models(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in MODELS]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names out of {', '.join(MODELS)}; got {text!r}")
    return names


def _pair(text: str) -> tuple[str, str]:
    names = text.split(",")
    if len(names) != 2 or not all(names):
        raise argparse.ArgumentTypeError(f"expected two names as A,B; got {text!r}")
    return names[0], names[1]


def run_fit(args: argparse.Namespace) -> str:
    config = _config(args)
    module = fit(config, load_data(config), args.out, resume=args.resume, progress=not args.quiet)
    return f"trained {config.model} on {config.data} for {module.current_epoch} epochs: {args.out}/last.ckpt"


def run_evaluate(args: argparse.Namespace) -> str:
    results = [evaluate_run(folder) for folder in find_runs(args.out)]
    print(table(summarise(results)))
    return f"evaluated {len(results)} run{'s' * (len(results) > 1)} below {args.out}"


def run_report(args: argparse.Namespace) -> str:
    print(table(write_report(args.out)))
    return f"wrote {args.out}/report.html"


def run_compare(args: argparse.Namespace) -> str:
    if args.seeds < 1 or args.trials < 0:
        raise ValueError(f"seeds must be at least 1 and trials at least 0, got {args.seeds} and {args.trials}")
    start = time.monotonic()
    base = _config(args)
    found = compare(base, args.models, range(args.seeds), args.out, number=args.trials, progress=not args.quiet)
    if args.json:
        save(args.json, found)
    print(table(found["summary"]))
    write_report(args.out)
    return f"compared {len(args.models)} models in {time.monotonic() - start:.0f} s: open {args.out}/report.html"


def run_demo(args: argparse.Namespace) -> str:
    args.models, args.trials, args.data, args.json = DEMO_MODELS, 0, "digits", None
    start = time.monotonic()
    run_compare(args)
    return f"demo done in {time.monotonic() - start:.0f} s: open {args.out}/report.html"


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    commands = {
        "fit": run_fit,
        "compare": run_compare,
        "evaluate": run_evaluate,
        "report": run_report,
        "demo": run_demo,
    }
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
