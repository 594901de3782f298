"""python -m benchmarks.fuzz --minutes 10 --json: damaged files against every reader.

It ends after --minutes, or after --inputs, whichever is given; after ten minutes else.

Each input is read by a forked worker with 1 GiB of memory above its start and 10 s of
processor time (that a machine is busy makes no hang; 300 s on the clock do). What is
neither accepted nor refused in one line (a traceback, crash, hang, memory beyond the
bound) is kept in --keep with its number; the same --seed makes the same inputs, but for
checkpoints, whose files have other names each time. Exit status 1 if there was any.
"""

import argparse
import collections
import faulthandler
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import fuzz_mutations
from benchmarks.fuzz_targets import TARGETS, outcome

MEMORY, CPU_SECONDS, WALL_SECONDS = 2**30, 10, 300.0
BAD = ("traceback", "crash", "hang", "memory")
_FORK = multiprocessing.get_context("fork")


def make_input(seeds, kind, seed, number) -> tuple[str, bytes]:
    """The file name and bytes of one damaged input, the same at each call."""
    rng = random.Random(f"{seed} {kind} {number}")
    path = rng.choice(seeds)
    return path.name, fuzz_mutations.mutate(path.read_bytes(), rng)


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def _private() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def _next_path(connection, parent):
    """The path that comes in; None once the process that would send it is gone."""
    while not connection.poll(1.0):
        if os.getppid() != parent:
            return None
    return connection.recv()


def _work(connection, kind, read, warm_up):
    """Reads the files whose paths come in; answers (outcome, words)."""
    parent = os.getppid()
    faulthandler.disable()  # a crash is counted, not told
    for path in warm_up:  # jax starts here, before the bound is set
        result, words = outcome(read, path)
        if result != "accepted":
            connection.send(f"{path.name} is {result}: {words}")
    bound = _private() + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    start = _resident()
    while path := _next_path(connection, parent):
        spent = int(time.process_time())
        # The system ends the process by SIGXCPU.
        resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, -1))
        result = outcome(read, path)
        if _resident() - start > MEMORY:
            result = "memory", f"{_resident() - start} bytes above its start"
        connection.send(result)


class Worker:
    """A process that reads files of one kind; a new one after a crash or a hang."""

    def __init__(self, kind, read, seeds, folder):
        self.kind, self.read, self.seeds, self.folder = kind, read, seeds, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.process = None

    def start(self):
        warm_up = []
        for path in self.seeds:
            warm_up.append(Path(shutil.copy(path, self.folder / f"warm_{path.name}")))
        self.connection, far = _FORK.Pipe()
        self.process = _FORK.Process(
            target=_work, args=(far, self.kind, self.read, warm_up), daemon=True
        )
        self.process.start()
        far.close()
        if not self.connection.poll(WALL_SECONDS):
            raise SystemExit(f"the reader of {self.kind} does not start")
        if (answer := self.connection.recv()) != "ready":
            raise SystemExit(f"{self.kind}: a whole file is not read; {answer}")

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = None

    def run(self, name, data) -> tuple[str, str]:
        if self.process is None:
            self.start()
        path = self.folder / name
        path.write_bytes(data)
        try:
            self.connection.send(path)
            if not self.connection.poll(WALL_SECONDS):
                self.stop()
                return "hang", f"over {WALL_SECONDS} s on the clock"
            return self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.stop()
            if code == -signal.SIGXCPU:
                return "hang", f"over {CPU_SECONDS} s of processor time"
            return "crash", f"exit status {code}"


def make_seeds(targets, folder) -> dict[str, list[Path]]:
    """Seed files by kind; in a process of its own, as jax must not start in this."""
    receive, send = _FORK.Pipe(duplex=False)

    def make():
        made = {}
        for kind, make_files, _ in targets:
            (folder / kind).mkdir(parents=True)
            made[kind] = make_files(folder / kind)
        send.send(made)

    process = _FORK.Process(target=make)
    process.start()
    send.close()
    try:
        made = receive.recv()
    except EOFError:
        raise SystemExit("the whole files could not be made") from None
    process.join()
    return made


def fuzz(targets, seed, *, seconds, most, keep, say) -> dict:
    """Counts of outcomes by kind, and the bad inputs; ``say`` hears of them often."""
    counts = {kind: collections.Counter() for kind, _, _ in targets}
    bad, start, number = [], time.monotonic(), 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    seeds = make_seeds(targets, folder / "seeds")
    workers = {
        kind: Worker(kind, read, seeds[kind], folder / "work" / kind)
        for kind, _, read in targets
    }
    try:
        while time.monotonic() - start < seconds and number < most:
            kind = targets[number % len(targets)][0]
            name, data = make_input(seeds[kind], kind, seed, number)
            result, words = workers[kind].run(name, data)
            counts[kind][result] += 1
            if result in BAD:
                keep.mkdir(parents=True, exist_ok=True)
                file = keep / f"{kind}_{seed}_{number}_{result}_{name}"
                file.write_bytes(data)
                bad.append({"file": str(file), "outcome": result, "words": words})
            number += 1
            if number % 200 == 0:
                say({"seed": seed, "inputs": number, "counts": counts, "bad": bad})
    except KeyboardInterrupt:
        print("stopped; the counts so far:", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return {"seed": seed, "inputs": number, "counts": counts, "bad": bad}


def main(arguments=None):
    kinds = [kind for kind, _, _ in TARGETS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--inputs", type=int, help="at most this many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"))
    parser.add_argument("--out", type=Path, help="a JSON file, written as it goes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)

    def say(so_far):
        line = f"{so_far['inputs']} inputs, {len(so_far['bad'])} bad"
        print(line, end="\r", file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text(json.dumps(so_far, indent=1))

    minutes = options.minutes
    if minutes is None:
        minutes = math.inf if options.inputs is not None else 10.0
    targets = [target for target in TARGETS if target[0] in options.kinds]
    result = fuzz(
        targets,
        options.seed,
        seconds=60 * minutes,
        most=math.inf if options.inputs is None else options.inputs,
        keep=options.keep,
        say=say,
    )
    say(result)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for kind, count in result["counts"].items():
            print(kind, dict(sorted(count.items())))
        for one in result["bad"]:
            print(f"{one['outcome']}: {one['file']} ({one['words']})")
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
