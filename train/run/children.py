"""The processes of a sweep: one after another for a seed, several seeds at once."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from train.measure import scores_file

LOG_LINES = 5  # of a failed run, shown on the terminal
GRACE = 60  # seconds that a stopped run has to save its state


def train_command(config_path: Path, seed: int, workdir: Path, jobs: int) -> list[str]:
    """Train a seed; it is measured apart, and the test split is not even named."""
    return [
        *(sys.executable, "-m", "train"),
        f"--config={config_path}",
        f"--config.seed={seed}",
        "--config.test_split=validation",
        "--noevaluate",
        *([] if jobs == 1 else ["--config.progress=False"]),
        f"--workdir={workdir}",
    ]


def scores_command(workdir: Path, arguments, phases) -> list[str]:
    """Measure what is missing of a seed."""
    command = [*(sys.executable, "-m", "train.scores")]
    command += ["--workdir", str(workdir), "--split", arguments.split]
    command += ["--phases", *phases] if phases else []
    command += [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    command += ["--num-perturbed", str(arguments.num_perturbed)]
    command += ["--all-perturbations"] if arguments.all_perturbations else []
    if arguments.methods:
        command += ["--methods", *arguments.methods]
        command += ["--num-method-images", str(arguments.num_method_images)]
    return command + (["--no-progress"] if arguments.jobs > 1 else [])


def is_trained(workdir: Path, wanted=()) -> bool:
    """Whether the wanted phases of a run (all of its own if ()) came to their end."""
    path = workdir / "config.json"
    if not path.exists():
        return False
    phases = tuple(wanted or json.loads(path.read_text())["phases"])
    return scores_file.finished_phases(workdir, phases) == phases


def is_measured(workdir: Path, arguments, phases) -> bool:
    """Whether a trained seed's scores are all there."""
    phases = phases or json.loads((workdir / "config.json").read_text())["phases"]
    record = scores_file.read(workdir, arguments.split)
    limits = scores_file.limits_of(arguments)
    return not scores_file.to_measure(record, phases, limits, arguments.methods)


def run_seeds(
    arguments, folder: Path, seeds, phases, wanted=(), say=print
) -> list[int]:
    """Train and measure what is missing of every seed; returns the seeds that failed.

    ``wanted`` are the phases of the file, ``phases`` those to measure (None: all).

    With one job the children write to the terminal, with several to seed_K.log. An
    interrupt, also of this function by SIGTERM, stops them with their state saved.
    """
    waiting = collections.deque(seeds)
    slots = cores_of(arguments.jobs)
    running, failed, done = {}, [], 0  # running: slot -> its current process

    def next_command(seed):
        workdir = folder / f"seed_{seed}"
        if not is_trained(workdir, wanted):
            return "train", train_command(
                arguments.config, seed, workdir, arguments.jobs
            )
        if not is_measured(workdir, arguments, phases):
            return "measure", scores_command(workdir, arguments, phases)
        return None

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            for slot, cores in enumerate(slots):
                if slot not in running and waiting:
                    seed = waiting.popleft()
                    running[slot] = SimpleNamespace(
                        seed=seed, process=None, made=[], start=time.perf_counter()
                    )
                job = running.get(slot)
                if job is None or (job.process and job.process.poll() is None):
                    continue
                code = job.process.returncode if job.process else 0
                task = next_command(job.seed) if code == 0 else None
                log = folder / f"seed_{job.seed}.log"
                if code or (task and task[0] in job.made):
                    what = f"exit status {code}" if code else "it stopped by itself"
                    say(f"seed {job.seed}: failed to {job.made[-1]} ({what})")
                    if arguments.jobs > 1:
                        say(_tail(log))
                    failed.append(job.seed)
                elif task:
                    job.made.append(task[0])
                    job.process = start(
                        task[1],
                        folder,
                        log=log if arguments.jobs > 1 else None,
                        cores=cores,
                    )
                    continue
                else:
                    done += 1
                    if job.made:
                        seconds = time.perf_counter() - job.start
                        say(
                            f"seed {job.seed}: {' and '.join(job.made)} done in "
                            f"{seconds:.0f} s ({done} of {len(seeds)} seeds)"
                        )
                del running[slot]
            time.sleep(0.1 if running else 0)
    finally:
        _stop([job.process for job in running.values() if job.process])
        signal.signal(signal.SIGTERM, before)
    return failed


def cores_of(jobs: int) -> list:
    """The cores of each job, a share of those that this process may use.

    None where the platform does not bind processes, or there is one job.
    """
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def start(command: list[str], folder: Path, *, log: Path | None, cores):
    """Start a child in a session of its own: an interrupt reaches it through us."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    # The seeds run the same programs, so only the first one compiles them.
    environment.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str((folder / ".jax_cache").absolute())
    )
    if log is None:
        print(" ".join(command[1:]), flush=True)
        process = subprocess.Popen(command, env=environment, start_new_session=True)
    else:
        environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        with open(log, "a") as file:
            print(" ".join(command[1:]), file=file, flush=True)
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    if cores:
        try:
            # Its threads, which come later, inherit this.
            os.sched_setaffinity(process.pid, cores)
        except ProcessLookupError:  # it has ended already
            pass
    return process


def _interrupt(*_):
    raise KeyboardInterrupt


def _stop(processes):
    """``train`` saves its state when it is asked to end."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    shown = "\n".join(f"    {line[:200]}" for line in lines[-LOG_LINES:])
    return f"  {log} ends with\n{shown}"
