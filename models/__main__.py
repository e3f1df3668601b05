"""Command line: ``python -m models list|fit|evaluate|compare|sweep|report|analyse|convert|inspect|demo``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models import settings
from models.analyses import ANALYSES, analyse
from models.compare import compare
from models.data import SOURCES
from models.data.corruption import CorruptionConfig
from models.evaluation.runs import evaluate_damaged, evaluate_run, find_runs, results_below, write_json
from models.evaluation.summary import summarise, table
from models.registry import MODELS
from models.report import uses
from models.report.write import write_report
from models.settings import RunConfig
from models.training import sweep
from models.training.distributed import processes_of
from models.training.fit import fit, load_data
from models.training.folder import refuse_folder
from models.training.history import epochs_of

DEMO_DATA = "two-digit-small"
DEMO_MODELS = ("factorcl-sup", "simclr", "supcon", "cross-self")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m models", description="Factorized multimodal models.")
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="models, data sets and configs that exist")
    train = commands.add_parser("fit", help="train one model")
    _add_config(train)
    train.add_argument("--seed", type=int, help="short for --set training.seed=S")
    train.add_argument(
        "--resume",
        nargs="?",
        const="last",
        choices=("last", "previous"),
        help="go on from OUT's last checkpoint, or the one before",
    )
    train.add_argument("--evaluate", action="store_true", help="score the run when it is done")
    many = commands.add_parser("compare", help="search settings on validation rows, then train over several seeds")
    many.add_argument("--data", default="digits")
    many.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for every model that has the key"
    )
    many.add_argument("--models", type=_models, default=DEMO_MODELS, help=f"some of {','.join(MODELS)}")
    many.add_argument("--trials", type=int, default=0, help="settings tried per model; 0: the settings given here")
    many.add_argument("--json", type=Path, help="write the results here as well")
    demo = commands.add_parser("demo", help="the three uses of the package, trained and measured here, on one page")
    demo.add_argument("--epochs", type=int)
    for command in (many, demo):
        command.add_argument("--seeds", type=int, default=2 if command is demo else 3, help="number of seeds")
    several = commands.add_parser("sweep", help="seeds and grids of settings side by side; resumes")
    _add_config(several)
    several.add_argument("--seeds", type=_seeds, default=(0,), help="as 0-4 or 0,3,5")
    several.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2", help="values of a setting")
    several.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    score = commands.add_parser("evaluate", help="scores of trained runs, also with damaged inputs")
    score.add_argument("--split", choices=("train", "valid", "test"), default="test")
    score.add_argument("--missing", action="append", default=[], metavar="NAME", help="a modality that is not there")
    score.add_argument("--noise", action="append", default=[], metavar="NAME=DEVIATION", help="NAME * means all")
    commands.add_parser("report", help="write OUT/report.html")
    for name in ("fit", "compare", "demo", "sweep", "evaluate", "report"):
        folder = Path("runs") / (name if name in ("demo", "compare", "sweep") else "run")
        said = f"folder that is written or read; {folder} when not given"
        commands.choices[name].add_argument("--out", type=Path, default=folder, help=said)
        commands.choices[name].add_argument("--quiet", action="store_true", help="no progress")
    for command in (train, many, demo, several):
        command.add_argument("--overwrite", action="store_true", help="replace a run that OUT holds")
    study = commands.add_parser("analyse", help="one system's own analysis: a JSON and a figure in OUT")
    study.add_argument("name", help=", ".join(ANALYSES))
    study.add_argument("--out", type=Path, default=Path("runs") / "analyses")
    study.add_argument("--quick", action="store_true", help="few steps, to see that it runs")
    change = commands.add_parser("convert", help="any known file format to the safe .npz")
    change.add_argument("input", type=Path)
    change.add_argument("output", type=Path)
    change.add_argument("--format", help="of the input; found out when not given")
    look = commands.add_parser("inspect", help="modalities, shapes, lengths, splits, labels, what is odd")
    look.add_argument("input", type=Path)
    return top


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, help="a YAML file with model, data and training")
    command.add_argument("--model", help=f"one of {', '.join(MODELS)}")
    command.add_argument("--data", help=f"{', '.join(SOURCES)} or a file")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as training.epochs=3")


def _config(args: argparse.Namespace) -> RunConfig:
    """--config FILE, or --model and --data (configs/MODEL/DATA.yaml where it exists); then --set and --seed."""
    if args.config:
        if args.model or args.data:
            raise ValueError("--config names a model and data: leave out --model and --data, or change them with --set")
        config = settings.from_file(args.config)
    else:
        config = settings.starting_point(args.model or DEMO_MODELS[0], args.data or "digits")
    changes = settings.parse_changes(args.set)
    if getattr(args, "seed", None) is not None:
        changes["training.seed"] = args.seed
    return config.changed(changes)


def _models(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in MODELS]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names out of {', '.join(MODELS)}; got {text!r}")
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


def run_list(args: argparse.Namespace) -> str:
    width = max(map(len, MODELS))
    print("models")
    for name, entry in MODELS.items():
        print(f"  {name:{width}}  {entry.summary}")
    print("data sets\n  " + "\n  ".join(SOURCES))
    found = settings.known_configs()
    print("configs\n  " + "\n  ".join(found))
    return f"{len(MODELS)} models, {len(SOURCES)} data sets, {len(found)} configs"


def run_fit(args: argparse.Namespace) -> str | None:
    config = _config(args)
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on from what --overwrite would replace: leave one of them out")
    if not args.resume:
        refuse_folder(args.out, overwrite=args.overwrite)
    settings_of_run = {"resume": args.resume or False, "overwrite": args.overwrite, "progress": not args.quiet}
    rank = processes_of(config.training.devices).rank
    module = fit(config, load_data(config), args.out, **settings_of_run)
    if rank:
        return None
    if args.evaluate:
        print(table(summarise([evaluate_run(args.out)])))
    return f"trained {config.name} on {module.data.name} for {epochs_of(args.out)} epochs: {args.out}"


def run_evaluate(args: argparse.Namespace) -> str:
    folders = find_runs(args.out)
    damage = CorruptionConfig(
        drop={name: 1.0 for name in args.missing},
        noise={name: _number(name, value) for name, value in (_pair(text) for text in args.noise)},
    )
    results: list[dict[str, Any]] = []
    for folder in folders:
        results += evaluate_damaged(folder, damage, args.split) if damage.active else [evaluate_run(folder, args.split)]
    print(table(summarise(results)))
    return f"evaluated {len(folders)} run{'s' * (len(folders) > 1)} below {args.out} on {args.split} rows"


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--noise must be NAME=DEVIATION, got {text!r}")
    return name, value


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"--noise of {name} must be a number, got {value!r}") from None


def run_report(args: argparse.Namespace) -> str:
    print(table(write_report(args.out)))
    return f"wrote {args.out}/report.html"


def run_compare(args: argparse.Namespace, before: Sequence[str] = ()) -> str:
    if args.seeds < 1 or args.trials < 0:
        raise ValueError(f"seeds must be at least 1 and trials at least 0, got {args.seeds} and {args.trials}")
    start = time.monotonic()
    changes = settings.parse_changes(args.set)
    bases = _bases(args.models, args.data, changes)
    options = {"number": args.trials, "progress": not args.quiet, "overwrite": args.overwrite}
    found = compare(bases, range(args.seeds), args.out, **options)
    if args.json:
        write_json(args.json, found)
    print(table(found["summary"]))
    write_report(args.out, before)
    return f"compared {len(args.models)} models in {time.monotonic() - start:.0f} s: open {args.out}/report.html"


def _bases(models: Sequence[str], data: str, changes: dict[str, Any]) -> dict[str, RunConfig]:
    """Where each model starts; a change of a model's setting goes to those that have it, and must reach one."""
    bases = {model: settings.starting_point(model, data) for model in models}
    found = {}
    for model, base in bases.items():
        mine = {n: v for n, v in changes.items() if not n.startswith("model.") or n in base.flat()}
        found[model] = base.changed(mine)
    for name in changes:
        if name.startswith("model.") and not any(name in base.flat() for base in bases.values()):
            raise ValueError(f"there is no setting {name} in {', '.join(models)}")
    return found


def run_sweep(args: argparse.Namespace) -> str:
    axes = {}
    for text in args.grid:
        name, equals, values = text.partition("=")
        if not equals:
            raise ValueError(f"--grid must be KEY=V1,V2, got {text!r}")
        axes[name] = [settings.parse_value(value, name) for value in values.split(",")]
    todo = sweep.jobs(_config(args), axes, args.seeds, args.out)
    failures = sweep.run(todo, args.jobs, overwrite=args.overwrite)
    results = []
    for folder, result in results_below(args.out) if len(failures) < len(todo) else []:
        group = folder.parent.relative_to(args.out) if args.out in folder.parents else Path()
        results.append(result | ({"label": f"{result['model']} {group}"} if str(group) != "." else {}))
    print(table(summarise(results)))
    write_json(args.out / "sweep.json", {"summary": summarise(results), "failed": failures})
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(todo)} runs failed; the last: {failures[-1]}")
    return f"swept {len(todo)} runs: {args.out}/sweep.json"


def run_demo(args: argparse.Namespace) -> str:
    args.models, args.trials, args.data, args.json = DEMO_MODELS, 0, DEMO_DATA, None
    args.set = [] if args.epochs is None else [f"training.epochs={args.epochs}"]
    start = time.monotonic()
    run_compare(args, before=(uses.swapped_loss(), uses.estimate()))
    return f"demo done in {time.monotonic() - start:.0f} s: open {args.out}/report.html"


def run_analyse(args: argparse.Namespace) -> str:
    print(analyse(args.name, args.out, args.quick))
    return f"wrote {args.out / args.name}.json and its figure"


def run_convert(args: argparse.Namespace) -> str:
    from models.data.convert import convert

    return convert(args.input, args.output, args.format)


def run_inspect(args: argparse.Namespace) -> str:
    from models.data.inspect import describe

    return describe(args.input)


COMMANDS: dict[str, Callable[[argparse.Namespace], str | None]] = {
    "list": run_list,
    "fit": run_fit,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "sweep": run_sweep,
    "report": run_report,
    "analyse": run_analyse,
    "convert": run_convert,
    "inspect": run_inspect,
    "demo": run_demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        if args.command != "fit" and processes_of(1).number > 1:
            raise ValueError(f"{args.command} cannot share its work between processes, fit can; start one process")
        said = COMMANDS[args.command](args)
        if said is not None:
            print(said)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; go on with: python -m models fit ... --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
