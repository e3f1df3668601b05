"""Command line: ``python -m models list|fit|evaluate|compare|sweep|report|analyse|convert|inspect|demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

try:
    from models import demo
    from models.data import SOURCES
    from models.data.formats.checks import suggestion
    from models.registry import MODELS
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: models/ needs the package {error.name}: pip install --no-build-isolation -e '.[models]'")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m models", description="Factorized multimodal models.")
    commands = top.add_subparsers(dest="command", required=True)
    known = commands.add_parser("list", help="list models, data sets, analyses and configs; or the settings of a model")
    known.add_argument("model", nargs="?", metavar="MODEL", help="show all settings of this model and what they mean")
    train = commands.add_parser(
        "fit",
        help="train one model",
        description="Trains one model. Settings are those of --config, or of models/configs/MODEL/DATA.yaml, or the "
        "defaults, which `list MODEL` shows; --set changes them.",
    )
    _add_config(train)
    train.add_argument("--seed", type=int, help="short for --set training.seed=S")
    train.add_argument(
        "--resume",
        nargs="?",
        const="last",
        choices=("last", "previous"),
        help="continue from OUT's last checkpoint, or from the previous one",
    )
    train.add_argument("--evaluate", action="store_true", help="score the run after training")
    many = commands.add_parser("compare", help="search settings on validation rows, then train over several seeds")
    many.add_argument("--data", default="digits", help="a data set or a file (default: digits)")
    many.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of every model that has it"
    )
    some = f"some of {','.join(MODELS)} (default: {','.join(demo.MODELS)})"
    many.add_argument("--models", type=_models, default=demo.MODELS, help=some)
    many.add_argument(
        "--trials", type=int, default=0, help="settings to try per model; 0, the default, uses the given settings"
    )
    many.add_argument("--json", type=Path, help="also write the results to this file")
    show = commands.add_parser("demo", help="train and measure examples of the package's three uses; writes one page")
    show.add_argument("--epochs", type=int, help="shorter or longer runs than those of the settings")
    for command in (many, show):
        number = 2 if command is show else 3
        command.add_argument("--seeds", type=int, default=number, help=f"number of seeds (default: {number})")
    several = commands.add_parser("sweep", help="train seeds and grids of settings in parallel; can be resumed")
    _add_config(several)
    several.add_argument("--seeds", type=_seeds, default=(0,), help="as 0-4 or 0,3,5 (default: 0)")
    several.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2", help="values of a setting")
    several.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    score = commands.add_parser("evaluate", help="score trained runs, optionally with corrupted inputs")
    score.add_argument("--split", choices=("train", "valid", "test"), default="test", help="(default: test)")
    score.add_argument("--missing", action="append", default=[], metavar="NAME", help="remove this modality")
    score.add_argument(
        "--noise", action="append", default=[], metavar="NAME=DEVIATION", help="add noise; NAME * means all"
    )
    commands.add_parser("report", help="write OUT/report.html")
    for name in ("fit", "compare", "demo", "sweep", "evaluate", "report"):
        folder = Path("runs") / (name if name in ("demo", "compare", "sweep") else "run")
        said = f"folder to write or read (default: {folder})"
        commands.choices[name].add_argument("--out", type=Path, default=folder, help=said)
        commands.choices[name].add_argument("--quiet", action="store_true", help="no progress")
    for command in (train, many, show, several):
        command.add_argument("--overwrite", action="store_true", help="replace an existing run in OUT")
    study = commands.add_parser("analyse", help="run an analysis of one system; writes a JSON file and a figure")
    study.add_argument("name", help="name of the analysis, see the command list")
    studies = Path("runs") / "analyses"
    study.add_argument("--out", type=Path, default=studies, help=f"folder to write or read (default: {studies})")
    study.add_argument("--quick", action="store_true", help="few steps, only to check that it runs")
    change = commands.add_parser("convert", help="convert any supported file format to .npz without pickles")
    change.add_argument("input", type=Path)
    change.add_argument("output", type=Path)
    change.add_argument("--format", help="format of the input; detected by default")
    change.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    look = commands.add_parser("inspect", help="show modalities, shapes, lengths, splits, labels and anything unusual")
    look.add_argument("input", type=Path)
    return top


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, help="YAML file with the keys model, data and training")
    command.add_argument("--model", help=f"one of {', '.join(MODELS)} (default: {demo.MODELS[0]})")
    command.add_argument("--data", help=f"{', '.join(SOURCES)} or a file (default: digits)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as training.epochs=3; may be repeated"
    )


def _models(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in MODELS]
    if unknown or len(set(names)) < len(names):
        meant = suggestion(unknown[0], MODELS) if unknown else ""
        raise argparse.ArgumentTypeError(f"expected different names out of {', '.join(MODELS)}; got {text!r}{meant}")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        found: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected seeds as 0-4 or 0,3,5; got {text!r}")
    return tuple(found)


def run_convert(args: argparse.Namespace) -> str:
    from models.data.convert import convert

    return convert(args.input, args.output, args.format, overwrite=args.overwrite)


def run_inspect(args: argparse.Namespace) -> str:
    from models.data.inspect import describe

    return describe(args.input)


def _run(args: argparse.Namespace) -> str | None:
    from models.commands import run

    return run(args)


# These commands do not need the trainer, whose import takes longer than their work.
READERS: dict[str, Callable[[argparse.Namespace], str]] = {"convert": run_convert, "inspect": run_inspect}


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        said = READERS[args.command](args) if args.command in READERS else _run(args)
        if said is not None:
            print(said)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; continue with: python -m models fit ... --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
