"""Times cases of suite.py on the code of a checkout, in one process per checkout, for `python -m bench compare`.

`python bench/worker.py CHECKOUT` imports mi_kernels and models from CHECKOUT and reads lines of JSON: {"prepare": case}
answers {"seconds": of one warm step} or {"error": text}; {"run": n, "slow": s} answers {"seconds": of n steps of the
case prepared last}, each followed by an idle loop of s times its length. This file imports nothing else of bench,
because CHECKOUT may have no bench folder, or another one.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path


def _suite(checkout: str):
    sys.path[:] = [checkout, *(p for p in sys.path if p and Path(p).resolve() != Path(__file__).resolve().parent)]
    spec = importlib.util.spec_from_file_location("suite_of_compare", Path(__file__).with_name("suite.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import mi_kernels

    if not Path(mi_kernels.__file__).resolve().is_relative_to(Path(checkout).resolve()):
        raise SystemExit(f"mi_kernels came from {mi_kernels.__file__}, not from {checkout}")
    return module


def _slowed(step, share: float):
    """The step with an artificial regression."""

    def run() -> None:
        start = time.perf_counter()
        step()
        end = time.perf_counter() + share * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass

    return run


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a model prints must not get among the answers
    suite, step = _suite(sys.argv[1]), None
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "prepare" in asked:
                step = suite.cases()[asked["prepare"]]()
                step()
            run = _slowed(step, asked["slow"]) if asked.get("slow") else step
            start = time.perf_counter()
            for _ in range(asked.get("run", 1)):
                run()
            answer = {"seconds": time.perf_counter() - start}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
