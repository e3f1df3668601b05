"""Reads mutated files: ``python -m tests.models.data.fuzz [FORMAT ...] [--count 10000]``, so many of each format.

A reader may return Arrays or raise a ValueError of one sentence that names the file. Anything else is a failure:
another exception, a crash, more than SECONDS, memory beyond a fixed allowance, starting a process, opening a
connection, or opening a file for writing. A forked worker reads the files; if it crashes or hangs, that is counted and
a new worker goes on with the next file. For HDF5 the worker calls the child process's function directly, because one
process per file would take hours. A crash or a hang is then counted as "contained", because in real use only the child
process would crash, or reach its time limit.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

from models.data import formats
from models.data.formats import hdf5, hdf5_child
from tests.models.data.writers import WRITERS

SECONDS, MEMORY = 10, 3 << 29  # FREE_BYTES (1 GiB) for the reader, the rest for numpy's temporaries
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
FORBIDDEN_EXIT = 99
INTERESTING = (
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\x01\0\0\0",
    b"\0\0\xc0\x7f",
    b"\0\0\x80\xff",
)


def mutate(data: bytes, seed: int) -> bytes:
    """Applies random mutations: flipped bits, unusual bytes or words, and cut, doubled, removed, swapped or inserted
    pieces. At least half of them are in the first 512 bytes, where headers are.
    """
    chooser = random.Random(seed)
    content = bytearray(data)
    for _ in range(chooser.choice((1, 1, 1, 2, 4, 16))):
        if not content:
            break
        at = chooser.randrange(min(len(content), 512) if chooser.random() < 0.5 else len(content))
        kind = chooser.randrange(8)
        if kind == 0:
            content[at] ^= 1 << chooser.randrange(8)
        elif kind == 1:
            content[at] = chooser.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            content[at] = chooser.randrange(256)
        elif kind == 3:
            content[at : at + 4] = chooser.choice(INTERESTING)
        elif kind == 4:
            del content[at : at + chooser.randrange(1, 64)]
        elif kind == 5:
            piece = content[at : at + chooser.randrange(1, 64)]
            content[at:at] = piece
        elif kind == 6:
            content[at:at] = bytes(chooser.randrange(256) for _ in range(chooser.randrange(1, 8)))
        elif chooser.random() < 0.3:
            del content[at:]
    return bytes(content)


class Target:
    """The files of one format, written once; ``damaged(seed)`` replaces one of them by a mutation."""

    def __init__(self, name: str, folder: Path):
        self.path = WRITERS[name](folder)
        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())
        self.files = [(file, file.read_bytes()) for file in files]
        self.format = name.split()[0]

    def damaged(self, seed: int) -> None:
        for file, data in self.files:
            file.write_bytes(data)
        file, data = self.files[seed % len(self.files)]
        file.write_bytes(mutate(data, seed))

    def read(self) -> str:
        """Reads the file; returns "read" or "refused". Raises if the reader fails in a way that is not allowed."""
        try:
            formats.read(self.path, self.format)
        except ValueError as error:
            text = str(error)
            assert "\n" not in text and str(self.path.parent) in text, f"no sentence about the file: {text!r}"
            assert "MemoryError" not in text, text
            unforeseen = " is damaged: " in text and "Error" in text
            return "refused for an error of unforeseen type" if unforeseen else "refused"
        except FileNotFoundError:
            return "refused"
        return "read"


def forbid(event: str, args: tuple) -> None:
    if event.startswith(FORBIDDEN):
        os.write(2, f"FORBIDDEN {event} {args!r}\n".encode())
        os._exit(FORBIDDEN_EXIT)


def read_in_worker(files: list[Path], out: Path, limit: int, seconds: float) -> list:
    """``hdf5._run`` without the child process."""
    listing = []
    with out.open("wb") as stream:
        for file in files:
            try:
                listing.append(hdf5_child.read_file(str(file), limit, stream))
            except Exception as error:
                raise ValueError(f"{file} is no file that can be read: {error}".replace("\n", " ")) from error
    return listing


def worker(target: Target, seeds: range, pipe: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    hdf5._run = read_in_worker
    sys.addaudithook(forbid)
    for seed in seeds:
        os.write(pipe, f"{seed}\n".encode())
        target.damaged(seed)
        signal.alarm(SECONDS)
        try:
            end = target.read()
        except BaseException as error:
            end = f"FAILED {type(error).__name__} {str(error)[:200]}".replace("\n", " ")
        signal.alarm(0)
        os.write(pipe, f" {end}\n".encode())
    os._exit(0)


def fuzz(name: str, count: int, first: int = 0) -> collections.Counter:
    """Counts how reading ended for ``count`` mutated files of one format."""
    ends: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Target(name, Path(folder))
        contained = target.format in ("csd", "mfn")
        seed = first
        while seed < first + count:
            read_end, write_end = os.pipe()
            child = os.fork()
            if child == 0:
                worker(target, range(seed, first + count), write_end)
            os.close(write_end)
            with os.fdopen(read_end) as lines:
                for line in lines:
                    if line.startswith(" "):
                        ends[line.strip()] += 1
                        if "FAILED" in line:
                            print(f"{name} seed {seed}: {line.strip()}", flush=True)
                    else:
                        seed = int(line)
            _, status = os.waitpid(child, 0)
            if status:
                kind = "hang" if status == signal.SIGALRM else f"death by status {status}"
                ran_code = os.waitstatus_to_exitcode(status) == FORBIDDEN_EXIT
                ends[f"contained {kind}" if contained and not ran_code else f"FAILED {kind}"] += 1
                print(f"{name} seed {seed}: {kind}", flush=True)
            seed += 1
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=list(WRITERS))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    failed = False
    for name in options.formats:
        start = time.monotonic()
        ends = fuzz(name, options.count, options.first)
        failed |= any("FAILED" in end for end in ends)
        print(f"{name}: {dict(ends)} in {time.monotonic() - start:.0f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
