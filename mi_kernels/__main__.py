"""Command line: `python -m mi_kernels estimate FILE.npz` estimates the mutual information of two arrays of a file,
`python -m mi_kernels bounds` lists all bounds."""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from .bounds import registry
from .estimate import MIEstimate, estimate_mi
from .estimate.api import CRITICS


class BadInputError(Exception):
    """An error in the user's input; its text is the whole message."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mi_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    standard = "(default: %(default)s)"
    estimate = commands.add_parser(
        "estimate",
        help="estimate the mutual information of two arrays [N, D] of one .npz file, in nats",
        description="Prints the estimate with its standard error, its 95 % interval and warnings. "
        "The exit status is 2 for bad input.",
    )
    estimate.add_argument("file", type=Path, metavar="FILE.npz")
    estimate.add_argument("--x", metavar="NAME", help="name of the first array (default: x)")
    estimate.add_argument("--y", metavar="NAME", help="name of the second array (default: y)")
    estimate.add_argument("--estimator", choices=registry.estimators(), default="infonce", help=f"the bound {standard}")
    estimate.add_argument("--critic", choices=CRITICS, default="hybrid", help=f"what scores the pairs {standard}")
    estimate.add_argument("--max-steps", type=int, default=1500, metavar="N", help=f"training steps at most {standard}")
    estimate.add_argument("--batch-size", type=int, default=256, metavar="N", help=f"samples a step {standard}")
    estimate.add_argument("--seed", type=int, default=0, metavar="N", help=f"of the split and the critic {standard}")
    estimate.add_argument("--device", metavar="NAME", help="cpu (default), cuda, ...")
    estimate.add_argument("--json", type=Path, metavar="OUT", help="write all fields of the result to this file")
    estimate.add_argument("--plot", type=Path, metavar="OUT", help="plot the fit and the value (.png, .pdf, ...)")
    estimate.add_argument("--quiet", action="store_true", help="no progress bar")
    commands.add_parser("bounds", help="print the table of all bounds: name, kind, value, ceiling, critics")
    return parser


def load(path: Path, x: str | None, y: str | None) -> tuple[Any, Any]:
    """Reads two arrays of a .npz file without unpickling anything. Raises BadInputError."""
    try:
        import numpy as np
    except ImportError:
        raise BadInputError("reading .npz files needs numpy: pip install numpy") from None
    _check_file(path)
    try:
        content = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadInputError(f"{path} is a damaged .npz file: {error}") from None
    with content:
        return _array(path, content, "x", x), _array(path, content, "y", y)


def _check_file(path: Path) -> None:
    """Raises BadInputError unless the file starts like a .npz file. NumPy would treat any other file as a pickle, and
    its error message would advise to allow pickles."""
    try:
        with path.open("rb") as file:
            start = file.read(6)
    except IsADirectoryError:
        raise BadInputError(f"{path} is a directory; a .npz file is needed") from None
    except FileNotFoundError:
        raise BadInputError(f"{path} does not exist") from None
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror or error}") from None
    if not start:
        raise BadInputError(f"{path} is empty; a .npz file with two arrays is needed")
    if start == b"\x93NUMPY":
        raise BadInputError(f"{path} holds one array (.npy); a .npz file with two is needed")
    if not start.startswith(b"PK"):
        raise BadInputError(f"{path} is not a .npz file, which would be a zip archive of arrays")


def _array(path: Path, content: Any, side: str, name: str | None) -> Any:
    name = name or side
    if name not in content.files:
        raise BadInputError(
            f"{path} holds no array {name!r}, only {', '.join(content.files) or 'nothing'}: name one with --{side}"
        )
    try:
        return content[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if "pickle" in str(error):
            error = ValueError("it holds Python objects, not numbers")
        raise BadInputError(f"array {name!r} of {path} cannot be read: {error}") from None


def _check_outputs(options: argparse.Namespace) -> None:
    """Raises BadInputError if a result could not be written, before the estimate takes its time."""
    for path in (options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            raise BadInputError(f"{path} cannot be written: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise BadInputError(f"{path} cannot be written: it is a folder")
    if options.plot is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInputError("--plot needs matplotlib: pip install matplotlib") from None
    known = sorted(Figure().canvas.get_supported_filetypes())
    if options.plot.suffix and options.plot.suffix[1:].lower() not in known:
        raise BadInputError(f"--plot must end in one of .{', .'.join(known)}; got {options.plot}")


def _save(found: MIEstimate, options: argparse.Namespace) -> None:
    try:
        if options.json:
            options.json.write_text(json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n")
        if options.plot:
            found.plot().figure.savefig(options.plot, dpi=150)
    except (OSError, ValueError) as error:
        raise BadInputError(str(error)) from None


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "bounds":
        print("\n".join(registry.table()))
        return 0
    try:
        _check_outputs(options)
        x, y = load(options.file, options.x, options.y)
        try:
            found = estimate_mi(
                x,
                y,
                estimator=options.estimator,
                critic=options.critic,
                max_steps=options.max_steps,
                batch_size=options.batch_size,
                seed=options.seed,
                device=options.device,
                progress=not options.quiet,
            )
        except ValueError as error:
            raise BadInputError(str(error)) from None
        print(found)
        _save(found, options)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
