"""Kill a training run again and again, fill its disk, cut its checkpoints off, and see that nothing is lost.

    python scripts/check_faults.py --kills 25 --json faults.json

Every kill is a SIGKILL: at a random moment of the run, or while a checkpoint is being written. The run then goes
on with --resume_from_checkpoint. At the end its adapter is compared, bit for bit, with that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import add_output_arguments, report, write_json
from safetensors.torch import load_file
from tiny_run import write_base, write_texts

from hf_lora.training.checkpoints import CHECKSUMS, checkpoints, newest_complete, problem, step_of

STEPS, SAVE_STEPS = 400, 2
SAVING, DELETING = ".partial", ".deleted"


class Job:
    """A training run in a folder: how it is started, and what is on the disk of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.output = folder / name

    def command(self, *extra: str) -> list[str]:
        """The command line of the run."""
        settings = {
            "model_name_or_path": self.folder / "base",
            "train_file": self.folder / "train.csv",
            "output_dir": self.output,
            "max_seq_length": 64,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "save_total_limit": 3,
            "eval_strategy": "no",
            "logging_steps": 1,
            "lora_dropout": 0.1,
            "precision": "fp32",
        }
        flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        return [
            sys.executable,
            "-m",
            "hf_lora.cli.main",
            "train",
            *flags,
            "--use_cpu",
            "--disable_tqdm",
            "True",
            *extra,
        ]

    def start(self, *extra: str, **options: Any) -> subprocess.Popen[str]:
        """Start the run in a process of its own."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            self.command(*extra),
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            **options,
        )

    def finish(self, *extra: str, **options: Any) -> tuple[int, str]:
        """Run to the end: exit code and the last line on standard error."""
        process = self.start(*extra, **options)
        _, errors = process.communicate()
        lines = [line for line in errors.splitlines() if line.strip()]
        return process.returncode, lines[-1] if lines else ""

    def newest(self) -> int:
        """The step of the newest whole checkpoint; 0 without one."""
        found = newest_complete(self.output)[0]
        return step_of(found) if found else 0

    def half_made(self) -> str | None:
        """What of a checkpoint the run left half-made: "saving", "deleting" or nothing."""
        names = [path.name for path in self.output.glob(".checkpoint-*")]
        if any(name.endswith(SAVING) for name in names):
            return "saving"
        return "deleting" if any(name.endswith(DELETING) for name in names) else None

    def adapter(self) -> dict[str, Any]:
        """The tensors of the run's adapter."""
        return load_file(self.output / "adapter_model.safetensors")


def kill_at_random(job: Job, process: subprocess.Popen[str], rng: random.Random) -> None:
    """Kill while the run starts, or up to a second after its first new checkpoint."""
    before = job.newest()
    started = until(
        lambda: process.poll() is not None or job.newest() > before, rng.choice([rng.uniform(0, 8), 60])
    )
    if started:
        time.sleep(rng.uniform(0.0, 1.0))


def kill_in_save(job: Job, process: subprocess.Popen[str], rng: random.Random) -> None:
    """Kill up to thirty milliseconds after a checkpoint's folder has come up, a few checkpoints on."""
    goal = job.newest() + SAVE_STEPS * rng.randint(1, 4)

    def saving() -> bool:
        staged = [path.name for path in job.output.glob(f".checkpoint-*{SAVING}")]
        steps = [int(name.removesuffix(SAVING).rpartition("-")[2]) for name in staged]
        return process.poll() is not None or any(step >= goal for step in steps)

    if until(saving, 60.0, pause=0.0002):
        time.sleep(rng.uniform(0.0, 0.03))


def until(met: Callable[[], bool], seconds: float, pause: float = 0.005) -> bool:
    """Wait until something is so, but not longer than `seconds`; whether it was."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if met():
            return True
        time.sleep(pause)
    return False


def kills(folder: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """Kill one run `count` times, and compare what comes of it with an undisturbed one."""
    undisturbed, job = Job(folder, "undisturbed"), Job(folder, "killed")
    code, last = undisturbed.finish()
    if code:
        raise SystemExit(f"the undisturbed run failed: {last}")
    hits: list[dict[str, Any]] = []
    for number in range(count):
        before = job.newest()
        process = job.start("--resume_from_checkpoint")
        # Two of three inside a save, where it is most delicate.
        (kill_at_random if number % 3 == 0 else kill_in_save)(job, process, rng)
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        broken = {path.name: reason for path in checkpoints(job.output) if (reason := problem(path))}
        where = (
            "after the end"
            if ended
            else job.half_made() or ("training" if job.newest() > before else "starting")
        )
        hits.append({"hit": where, "before": before, "after": job.newest(), "broken": broken})
    code, last = job.finish("--resume_from_checkpoint")
    if code:
        raise SystemExit(f"the run did not go on after the kills: {last}")
    ours, expected = job.adapter(), undisturbed.adapter()
    return {
        "hits": hits,
        "steps_lost_to_a_broken_checkpoint": sum(hit["after"] < hit["before"] for hit in hits),
        "broken_checkpoints": sum(bool(hit["broken"]) for hit in hits),
        "tensors": len(expected),
        "tensors_equal": sum(bool((ours[key] == expected[key]).all()) for key in expected),
        "left_over": [path.name for path in job.output.glob(".checkpoint-*")],
    }


def cut_off(folder: Path, rng: random.Random, cuts: int = 300) -> dict[str, Any]:
    """Cut the files of a checkpoint off at random bytes: is each seen, and the checkpoint before it used?"""
    run = folder / "cut"
    run.mkdir()
    older, newer = checkpoints(folder / "undisturbed")[-2:]
    shutil.copytree(older, run / older.name)
    seen, used = 0, 0
    files = sorted(path.relative_to(newer) for path in newer.rglob("*") if path.is_file())
    for _ in range(cuts):
        shutil.copytree(newer, run / newer.name)
        victim = run / newer.name / rng.choice(files)
        size = victim.stat().st_size
        os.truncate(victim, rng.randrange(size))
        chosen, broken = newest_complete(run)
        seen += bool(broken)
        used += chosen is not None and chosen.name == older.name
        shutil.rmtree(run / newer.name)
    return {"cuts": cuts, "recognised": seen, "went_back": used, "files": len(files), "list": CHECKSUMS}


def full_disk(folder: Path) -> dict[str, Any]:
    """No file may grow beyond 60 kB: the first optimizer state does not fit. One line, and earlier files untouched."""
    job = Job(folder, "full")
    limit = 60_000
    code, last = job.finish(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    left = sorted(path.name for path in job.output.iterdir()) if job.output.is_dir() else []
    again, _ = job.finish("--resume_from_checkpoint")
    return {"exit_code": code, "message": last, "left": left, "went_on": again == 0}


def no_directory(folder: Path) -> dict[str, Any]:
    """The output directory cannot be made."""
    (folder / "file").write_text("")
    code, last = Job(folder, "file/run").finish()
    return {"exit_code": code, "message": last}


def shared(folder: Path) -> dict[str, Any]:
    """Two runs in one directory: the second is refused, the first goes on to its end."""
    job = Job(folder, "shared")
    first = job.start()
    until(lambda: job.newest() > 0 or first.poll() is not None, 60.0)
    first.send_signal(signal.SIGSTOP)  # so that it cannot end before the second has tried
    code, last = job.finish("--resume_from_checkpoint")
    first.send_signal(signal.SIGCONT)
    first.communicate()
    return {"exit_code": code, "message": last, "first": first.returncode}


def terminated(folder: Path) -> dict[str, Any]:
    """SIGTERM: a checkpoint of that very step, the documented exit code, and the same adapter in the end."""
    job = Job(folder, "terminated")
    process = job.start("--save_steps", "100000")
    until(lambda: _in_training(process.pid), 60.0)
    time.sleep(STEPS / 400)  # a little into it, and not beyond its end
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    saved = job.newest()
    code, _ = job.finish("--resume_from_checkpoint")
    ours, expected = job.adapter(), Job(folder, "undisturbed").adapter()
    return {
        "exit_code": process.returncode,
        "message": errors.splitlines()[-1] if errors else "",
        "saved_step": saved,
        "tensors_equal": sum(bool((ours[key] == expected[key]).all()) for key in expected),
        "resumed": code,
    }


def _in_training(pid: int) -> bool:
    """Whether a process catches SIGTERM, which a run does from its first step on."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "full_disk": full_disk,
    "no_directory": no_directory,
    "shared": shared,
    "terminated": terminated,
}


def main() -> None:
    """Run all of it, print tables, write JSON; exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_arguments(parser, plot=False)
    parser.add_argument("--kills", type=int, default=25, help="SIGKILLs (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    table, rng = report(options), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_base(folder / "base")
        write_texts(folder / "train.csv", 200)
        result: dict[str, Any] = {"kills": kills(folder, options.kills, rng)}
        rows = [
            (i, hit["hit"], hit["before"], hit["after"], "; ".join(hit["broken"].values()) or "none")
            for i, hit in enumerate(result["kills"]["hits"], 1)
        ]
        table("kills", ("kill", "hit while", "whole checkpoint before", "after", "broken checkpoints"), rows)
        result["cut_off"] = cut_off(folder, rng)
        for name, check in CHECKS.items():
            result[name] = check(folder)
    checks = verdicts(result)
    table("verdicts", ("check", "held"), [(name, "yes" if held else "NO") for name, held in checks.items()])
    for what in CHECKS:
        table(what, ("exit code", "message"), [(result[what]["exit_code"], result[what]["message"])])
    write_json(options.json, {**result, "held": checks})
    if not all(checks.values()):
        raise SystemExit(1)


def verdicts(result: dict[str, Any]) -> dict[str, bool]:
    """What must hold."""
    killed, cut = result["kills"], result["cut_off"]
    return {
        "no checkpoint was half-made": killed["broken_checkpoints"] == 0,
        "no whole checkpoint was lost": killed["steps_lost_to_a_broken_checkpoint"] == 0,
        "some kills hit a save": any(hit["hit"] == "saving" for hit in killed["hits"]),
        "the final adapter is that of the undisturbed run": killed["tensors_equal"] == killed["tensors"],
        "nothing half-made is left": not killed["left_over"],
        "every cut was recognised": cut["recognised"] == cut["cuts"] == cut["went_back"],
        "a full disk ends in one line": result["full_disk"]["exit_code"] == 2,
        "and the run goes on when there is room": result["full_disk"]["went_on"],
        "no directory ends in one line": result["no_directory"]["exit_code"] == 2,
        "a second run in the directory is refused": result["shared"]["exit_code"] == 2,
        "and the first one ends well": result["shared"]["first"] == 0,
        "SIGTERM saves and exits with 143": result["terminated"]["exit_code"] == 143
        and result["terminated"]["saved_step"] > 0,
        "and the resumed run ends with the same adapter": result["terminated"]["tensors_equal"]
        == killed["tensors"],
    }


if __name__ == "__main__":
    main()
