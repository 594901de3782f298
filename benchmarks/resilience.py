"""python -m benchmarks.resilience [--json] [--kills 20] [--quick]: what a run survives.

A real small run (`python -m train`, three phases) is killed by -9 at random moments,
also while it saves, and started again by the same command each time, until it is done.
It must end with bitwise the parameters, statistics, optimizer state and metrics file of
a run that nobody touched. Then every other fault is tried on copies of a stopped run.
Exit status 1 if anything was lost.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from train.show.markdown import markdown

ROOT = Path(__file__).parents[1]
FILES = "files.json"  # train.run.checkpoint.FILES; importing it would start jax here
# Small enough for a start to cost more than the steps, saved often enough for kills to
# fall into saves: every epoch of 8 steps, the newest two and the best are kept.
CONFIG = '''"""The run that benchmarks/resilience.py kills."""

from configs import default


def get_config():
    config = default.get_config()
    config.dataset_options.update(num_train=128, num_validation=32, num_test=32)
    config.model_options.update(stage_sizes=(1,), stage_strides=(2,))
    config.batch_size = 16
    config.plain.num_epochs = 4.0
    config.control.num_epochs = config.guided.num_epochs = 3.0
    config.guided.update(default.BOTTLENECK)
    config.guided.bottleneck.num_steps = 5
    config.guided.mu, config.guided.every = 3.0, 1
    config.save_epochs = 0.25
    config.log_every = 3
    config.progress = False
    config.picture_phases = ()
    return config
'''


class Runs:
    """Starts the same run in any folder.

    Args:
      folder: for data, compiled programs and the runs.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = self.folder / "small_run.py"
        self.config.write_text(CONFIG)

    def start(self, workdir, *, num_devices=1, fields=()):
        """The running process, and a file of what it prints."""
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
            # A restart finds its programs compiled, as it would on a cluster.
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "PYTHONPATH": str(ROOT),
        }
        command = [
            sys.executable,
            "-m",
            "train",
            f"--config={self.config}",
            f"--config.data_dir={self.folder / 'data'}",
            f"--workdir={workdir}",
            *fields,
        ]
        with open(f"{workdir}.log", "ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def finish(self, workdir, **options) -> tuple[int, str]:
        """Run to the end: exit status, and what was printed this time."""
        log = Path(f"{workdir}.log")
        before = log.stat().st_size if log.exists() else 0
        status = self.start(workdir, **options).wait(timeout=900)
        return status, log.read_bytes()[before:].decode(errors="replace")

    def outcome(self, workdir) -> dict:
        """Everything that must not depend on how often a run was killed."""
        found = {
            name: (workdir / name).read_bytes()
            for name in ("metrics.jsonl", "results.json")
        }
        for folder in sorted((workdir / "checkpoints").iterdir()):
            if folder.name.endswith(("_damaged", "_again")):
                continue
            step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
            # The checksum is of every bit of parameters, statistics, optimizer state.
            meta = (folder / str(step) / "meta" / "metadata").read_text()
            found[folder.name] = step, json.loads(meta)["checksum"]
        return found


def is_saving(workdir) -> bool:
    """Whether a checkpoint is being written."""
    return any(Path(workdir, "checkpoints").glob("*/*tmp*"))


def kill_test(runs, reference, num_kills, generator) -> dict:
    """Runs killed at random moments until so many kills were made."""
    kills, while_saving, num_runs, same = 0, 0, 0, 0
    while kills < num_kills:
        workdir = runs.folder / f"killed_{num_runs}"
        num_runs += 1
        while True:
            process = runs.start(workdir)
            wants_save = kills % 4 == 3  # some must hit a save, which is short
            end = time.monotonic() + generator.uniform(0.5, 12.0)
            while process.poll() is None and kills < num_kills:
                now = time.monotonic()
                if now > end and (not wants_save or is_saving(workdir)):
                    break
                time.sleep(0.0005 if wants_save and now > end else 0.01)
            if process.poll() is not None:
                break
            if kills == num_kills:
                process.wait()
                break
            saving = is_saving(workdir)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            while_saving += saving
            _tell(f"kill {kills}{' in a save' if saving else ''}")
        if process.returncode != 0:
            _tell(Path(f"{workdir}.log").read_text()[-2000:])
            break
        same += runs.outcome(workdir) == reference
        _tell(f"run {num_runs}: {'same' if same == num_runs else 'DIFFERENT'}")
    return {
        "fault": "kill -9 at a random moment",
        "times": kills,
        "while_saving": while_saving,
        "runs": num_runs,
        "lost": num_runs - same,
    }


def largest_file(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(folder, generator):
    path = largest_file(folder)
    os.truncate(path, generator.randrange(path.stat().st_size))


def flip_bit(folder, generator):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def delete_file(folder, generator):
    """Any but the list of checksums: without it, the one of the arrays is taken."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    generator.choice([path for path in files if path.name != FILES]).unlink()


def stop(runs, workdir, generator) -> tuple[int, float]:
    """SIGTERM in the middle of the run: exit status and the seconds it took."""
    process = runs.start(workdir)
    folder = workdir / "checkpoints" / "control"
    while process.poll() is None and not any(
        path.name.isdigit() for path in folder.glob("*")
    ):
        time.sleep(0.01)
    time.sleep(generator.uniform(0.0, 0.1))
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    return process.wait(), time.monotonic() - begin


def damage_test(runs, stopped, reference, damage, times, generator) -> dict:
    """The newest checkpoint of a stopped run is damaged, then the run goes on."""
    lost = noticed = 0
    for i in range(times):
        workdir = runs.folder / f"{damage.__name__}_{i}"
        shutil.copytree(stopped, workdir)
        newest = newest_checkpoint(workdir)
        damage(newest, generator)
        status, text = runs.finish(workdir)
        noticed += f"{newest} is damaged" in text
        lost += status != 0 or runs.outcome(workdir) != reference
    return {"times": times, "noticed": noticed, "lost": lost}


def newest_checkpoint(workdir):
    phases = sorted(
        (workdir / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime
    )
    step = max(int(p.name) for p in phases[-1].iterdir() if p.name.isdigit())
    return phases[-1] / str(step)


def all_damaged_test(runs, stopped) -> dict:
    workdir = runs.folder / "all_damaged"
    shutil.copytree(stopped, workdir)
    folder = newest_checkpoint(workdir).parent
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    before = sorted(folder.rglob("*"))
    status, text = runs.finish(workdir)
    refused = status == 2 and "no checkpoint in" in text
    return {"times": 1, "lost": int(not refused or sorted(folder.rglob("*")) != before)}


def full_disk_test(runs, stopped, reference, times, generator) -> dict:
    """Writes fail from some moment on (a limit on the size of files); then not."""
    lost = clean = 0
    for i in range(times):
        workdir = runs.folder / f"full_{i}"
        shutil.copytree(stopped, workdir)
        process = runs.start(workdir)
        while process.poll() is None and not (workdir / ".lock").exists():
            time.sleep(0.01)
        folder = workdir / "checkpoints" / "guided"
        while process.poll() is None and not folder.exists():
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.3))
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        status = process.wait()
        last = Path(f"{workdir}.log").read_text().strip().splitlines()[-1]
        clean += status == 2 and last.startswith("error: cannot")
        status, _ = runs.finish(workdir)
        lost += status != 0 or runs.outcome(workdir) != reference
    return {"times": times, "stopped_in_one_line": clean, "lost": lost}


def second_run_test(runs, reference) -> dict:
    """The same command again while it runs."""
    workdir = runs.folder / "twice"
    first = runs.start(workdir)
    while first.poll() is None and not (workdir / "config.json").exists():
        time.sleep(0.01)
    other = subprocess.run(first.args, cwd=ROOT, capture_output=True, text=True)
    text = other.stderr
    refused = other.returncode == 2 and "another run is writing" in text
    same = first.wait() == 0 and runs.outcome(workdir) == reference
    return {"times": 1, "lost": int(not (refused and same))}


def other_config_test(runs, stopped, reference) -> dict:
    workdir = runs.folder / "other_config"
    shutil.copytree(stopped, workdir)
    status, text = runs.finish(workdir, fields=["--config.guided.mu=4.0"])
    refused = status == 2 and "guided.mu (3.0 -> 4.0)" in text
    status, _ = runs.finish(workdir)
    same = status == 0 and runs.outcome(workdir) == reference
    return {"times": 1, "lost": int(not (refused and same))}


def other_devices_test(runs, stopped) -> dict:
    """Goes on with two devices where it had one: a notice, and sums that differ."""
    workdir = runs.folder / "two_devices"
    shutil.copytree(stopped, workdir)
    status, text = runs.finish(workdir, num_devices=2)
    told = "resumed on 2 devices, was on 1" in text
    return {"times": 1, "lost": int(status != 0 or not told)}


def run(num_kills, folder, seed=0, *, quick=False) -> list[dict]:
    """All faults; a list of rows with at least fault, times and lost."""
    generator = random.Random(seed)
    runs = Runs(folder)
    begin = time.monotonic()
    status, text = runs.finish(runs.folder / "whole")
    if status:
        raise SystemExit(text)
    reference = runs.outcome(runs.folder / "whole")
    _tell(f"undisturbed run: {time.monotonic() - begin:.0f} s")
    rows = [kill_test(runs, reference, num_kills, generator)]
    if quick:
        return rows

    stopped = runs.folder / "stopped"
    status, seconds = stop(runs, stopped, generator)
    copy = runs.folder / "stopped_on"
    shutil.copytree(stopped, copy)
    again, _ = runs.finish(copy)
    same = status == again == 0 and runs.outcome(copy) == reference
    row = {"times": 1, "seconds_to_stop": round(seconds, 2), "lost": int(not same)}
    rows.append({"fault": "SIGTERM", **row})
    for fault, measure in (
        ("newest checkpoint truncated", lambda: damage(truncate)),
        ("one bit of the newest checkpoint flipped", lambda: damage(flip_bit)),
        ("a file of the newest checkpoint deleted", lambda: damage(delete_file)),
        ("all checkpoints damaged: refused", lambda: all_damaged_test(runs, stopped)),
        (
            "disk full while running",
            lambda: full_disk_test(runs, stopped, reference, 3, generator),
        ),
        (
            "second run in the workdir: refused",
            lambda: second_run_test(runs, reference),
        ),
        (
            "another configuration in the workdir: refused",
            lambda: other_config_test(runs, stopped, reference),
        ),
        (
            "restart on another number of devices",
            lambda: other_devices_test(runs, stopped),
        ),
    ):

        def damage(kind):
            return damage_test(runs, stopped, reference, kind, 3, generator)

        rows.append({"fault": fault, **measure()})
        _tell(str(rows[-1]))
    return rows


def table(rows) -> str:
    lines = []
    for row in rows:
        rest = {k: v for k, v in row.items() if k not in ("fault", "times", "lost")}
        notes = ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in rest.items())
        lost = str(row["lost"] or "nothing")
        lines.append((row["fault"], str(row["times"]), lost, notes))
    return markdown(("fault", "times", "lost", ""), lines)


def _tell(text):
    print(text, file=sys.stderr, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--kills", type=int, default=20, help="how many kills by -9")
    parser.add_argument("--quick", action="store_true", help="kills alone")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.kills, folder, arguments.seed, quick=arguments.quick)
    lost = sum(row["lost"] for row in rows)
    print(json.dumps({"rows": rows, "lost": lost}) if arguments.json else table(rows))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
