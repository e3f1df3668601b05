"""The commands of ``python -m models`` that train, score or report."""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

from models import demo, settings
from models.analyses import ANALYSES, analyse
from models.compare import compare
from models.data import SOURCES, sources
from models.data.corruption import CorruptionConfig
from models.described import described
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


def run(args: argparse.Namespace) -> str | None:
    """Runs a command and returns the last line to print, or None in processes other than the first."""
    if args.command != "fit" and processes_of(1).number > 1:
        raise ValueError(f"{args.command} cannot share its work between processes, fit can; start one process")
    return COMMANDS[args.command](args)


def _config(args: argparse.Namespace) -> RunConfig:
    """Settings from --config FILE, or from --model and --data (configs/MODEL/DATA.yaml if it exists); then --set and
    --seed.

    A run that is resumed without these options uses its own settings.
    """
    if getattr(args, "resume", False) and not (args.config or args.model or args.data):
        config = settings.read(args.out)
    elif args.config:
        if args.model or args.data:
            raise ValueError("--config names a model and data: leave out --model and --data, or change them with --set")
        config = settings.from_file(args.config)
    else:
        config = settings.starting_point(args.model or demo.MODELS[0], args.data or "digits")
    changes = settings.parse_changes(args.set)
    if getattr(args, "seed", None) is not None:
        changes["training.seed"] = args.seed
    return config.changed(changes)


def run_list(args: argparse.Namespace) -> str:
    if args.model:
        return described(args.model, demo.DATA)
    width = max(map(len, MODELS))
    print("models")
    for name, entry in MODELS.items():
        print(f"  {name:{width}}  {entry.summary}")
    width = max(map(len, SOURCES))
    print("data sets")
    for name, module in sources.MODULES.items():
        first = " ".join(inspect.cleandoc(module.__doc__ or "").split("\n\n")[0].split())
        print(f"  {name:{width}}  {first.replace('``', '')}")
    print("analyses\n  " + "\n  ".join(ANALYSES))
    found = settings.known_configs()
    print("configs\n  " + "\n  ".join(found))
    return f"{len(MODELS)} models, {len(SOURCES)} data sets, {len(found)} configs; list MODEL shows the settings of one"


def run_fit(args: argparse.Namespace) -> str | None:
    if args.resume and args.overwrite:
        raise ValueError("--resume continues the run that --overwrite would replace: use only one of them")
    config = _config(args)
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
    """The initial settings of each model. A change applies to the models that have the setting; at least one must have
    it."""
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
        if not equals or not name:
            raise ValueError(f"--grid must be KEY=V1,V2, got {text!r}")
        if name in axes:
            raise ValueError(f"--grid names {name} twice; give its values in one: --grid {name}=V1,V2")
        axes[name] = [settings.parse_value(value, name) for value in values.split(",")]
    todo = sweep.jobs(_config(args), axes, args.seeds, args.out)
    failures = sweep.run(todo, args.jobs, overwrite=args.overwrite)
    results = [result for _, result in results_below(args.out)] if len(failures) < len(todo) else []
    print(table(summarise(results)))
    write_json(args.out / "sweep.json", {"summary": summarise(results), "failed": failures})
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(todo)} runs failed; the last: {failures[-1]}")
    return f"swept {len(todo)} runs: {args.out}/sweep.json"


def run_demo(args: argparse.Namespace) -> str:
    args.models, args.trials, args.data, args.json = demo.MODELS, 0, demo.DATA, None
    args.set = [] if args.epochs is None else [f"training.epochs={args.epochs}"]
    start = time.monotonic()
    changes = settings.parse_changes(args.set)
    for folder in demo.make_room(args.out, _bases(args.models, args.data, changes), range(args.seeds)):
        print(f"{folder}: removed, because an earlier demo wrote it with other settings", flush=True)
    run_compare(args, before=(uses.swapped_loss(), uses.estimate()))
    return f"demo done in {time.monotonic() - start:.0f} s: open {args.out}/report.html"


def run_analyse(args: argparse.Namespace) -> str:
    print(analyse(args.name, args.out, args.quick))
    return f"wrote {args.out / args.name}.json and its figure"


COMMANDS: dict[str, Callable[[argparse.Namespace], str | None]] = {
    "list": run_list,
    "fit": run_fit,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "sweep": run_sweep,
    "report": run_report,
    "analyse": run_analyse,
    "demo": run_demo,
}
