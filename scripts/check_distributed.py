"""Train the same on one process, on two with DDP, on two with FSDP2 and on two hosts, and compare every step.

    python scripts/check_distributed.py --json distributed.json

Real processes over gloo. A host is a network namespace with a wire to the other; that part is skipped, saying so,
where the system does not allow namespaces. fp32, no dropout: losses, gradients and adapters must agree to 1e-5.
Printed beside them is what was sent at each step, and what went over the wire between the hosts, as the system counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks import add_output_arguments, report, write_json
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_lora import LoRAConfig, LoRATrainer, LoRATrainingArguments, inject_lora
from hf_lora.training.distributed import gathered

STEPS, EXAMPLES, EVALUATED, TOLERANCE = 10, 100, 37, 1e-5
CONFIGS = Path(__file__).parent / "accelerate"
# name: processes, batch of each, accumulated batches, configuration of accelerate (None: a plain process).
RUNS: dict[str, tuple[int, int, int, str | None]] = {
    "one process": (1, 16, 1, None),
    "DDP": (2, 8, 1, "cpu_2"),
    "FSDP2": (2, 8, 1, "cpu_2_fsdp2"),
    "one process, 2 accumulated": (1, 8, 2, None),
    "DDP, 2 accumulated": (2, 4, 2, "cpu_2"),
    "FSDP2, 2 accumulated": (2, 4, 2, "cpu_2_fsdp2"),
}


class Counter(TorchDispatchMode):
    """Adds up the bytes that each kind of collective is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            # The result comes first where there is one, then what is sent.
            sent = args[1] if name.startswith(("allgather", "reduce_scatter")) else args[0]
            tensors = [t for t in _flat(sent) if isinstance(t, torch.Tensor)]
            self.sent[name] = self.sent.get(name, 0) + sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


class Watch(TrainerCallback):
    """Keeps the gradients of every step, whole, and what DDP sends of them."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.ddp_bytes: list[int] = []
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Listen to DDP's reduction, where there is one."""
        wrapped = self.trainer.model_wrapped
        if hasattr(wrapped, "register_comm_hook"):
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def counted(state: Any, bucket: Any) -> Any:
                self.ddp_bytes[-1] += bucket.buffer().nbytes
                return allreduce_hook(state, bucket)

            counted.__annotations__ = {}  # DDP compares them with types, and here they are strings
            wrapped.register_comm_hook(None, counted)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A new step."""
        self.ddp_bytes.append(0)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Keep the gradients that the optimizer is about to use."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        named = sorted((n, p.grad) for n, p in model.named_parameters() if p.requires_grad)
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for _, g in named if g is not None]
        self.gradients.append(torch.cat([g.detach().reshape(-1) for g in whole]))


def data(count: int, seed: int) -> Dataset:
    """Random tokens of 4 to 20 in a row; the label is whether the first is in the upper half."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(
            5, 200, (int(torch.randint(4, 21, (1,), generator=generator)),), generator=generator
        ).tolist()
        for _ in range(count)
    ]
    masks = [[1] * len(row) for row in rows]
    return Dataset.from_dict(
        {"input_ids": rows, "attention_mask": masks, "labels": [int(row[0] > 102) for row in rows]}
    )


def train(order: dict[str, Any]) -> None:
    """One process's part of a run; the first writes results, gradients and the adapter."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    # B is zero at the start, and so would be the gradients of A.
    inject_lora(model, LoRAConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.02)
    arguments = LoRATrainingArguments(
        order["folder"],
        max_steps=STEPS,
        per_device_train_batch_size=order["batch"],
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=order["accumulated"],
        train_sampling_strategy="group_by_length",
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    watch = Watch()
    trainer = LoRATrainer(
        model=model,
        args=arguments,
        train_dataset=data(EXAMPLES, 1),
        eval_dataset=data(EVALUATED, 2),
        data_collator=_collate,
        callbacks=[watch],
    )
    watch.trainer = trainer
    counter = Counter()
    with counter:
        trainer.train()
    predicted = trainer.predict(data(EVALUATED, 2))
    trainer.save_model()
    plain = trainer.accelerator.unwrap_model(trainer.model)
    with gathered(plain):
        trained = sum(p.nbytes for p in plain.parameters() if p.requires_grad)
    if trainer.is_world_process_zero():
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        save_file(
            {
                "gradients": torch.stack(watch.gradients),
                "logits": torch.from_numpy(predicted.predictions).contiguous(),
            },
            Path(order["folder"]) / "steps.safetensors",
        )
        result = {
            "losses": [entry["loss"] for entry in steps],
            "evaluated": len(predicted.predictions),
            "ranks": arguments.world_size,
            "trained_bytes": trained,
            "frozen_bytes": sum(p.nbytes for p in plain.parameters() if not p.requires_grad),
            "gradient_bytes": max(watch.ddp_bytes, default=0),
            "collectives": {name: total // STEPS for name, total in counter.sent.items()},
        }
        (Path(order["folder"]) / "result.json").write_text(json.dumps(result))


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padded = {
        name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}


def command(order: dict[str, Any], config: str | None, launcher: Sequence[str] = ()) -> list[str]:
    """The command line of a run's processes on one host."""
    own = [__file__, "--worker", json.dumps(order)]
    if config is None:
        return [sys.executable, *own]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / f"{config}.yaml"),
    ]
    return [*launch, *launcher, *own]


def run(folder: Path, name: str) -> dict[str, Any]:
    """Start a run, wait for it, read what it wrote."""
    _, batch, accumulated, config = RUNS[name]
    order = {"folder": str(folder / name), "batch": batch, "accumulated": accumulated}
    finished = subprocess.run(command(order, config), capture_output=True, text=True, env=environment())
    if finished.returncode:
        raise SystemExit(f"{name} failed:\n{finished.stderr[-3000:]}")
    return read(folder / name)


def environment(**more: str) -> dict[str, str]:
    """Without threads that would wait for each other, and without a network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def read(folder: Path) -> dict[str, Any]:
    """What the first process wrote."""
    return {
        **json.loads((folder / "result.json").read_text()),
        **load_file(folder / "steps.safetensors"),
        "adapter": load_file(folder / "adapter_model.safetensors"),
    }


def compare(reference: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The largest differences, relative to the largest value."""
    losses = [torch.tensor(side["losses"]) for side in (reference, other)]
    adapters = [
        torch.cat([t.reshape(-1) for _, t in sorted(side["adapter"].items())]) for side in (reference, other)
    ]
    differences = {
        "loss": _difference(*losses),
        "gradients": _difference(reference["gradients"], other["gradients"]),
        "adapter": _difference(*adapters),
        "logits": _difference(reference["logits"], other["logits"]),
    }
    return {
        **differences,
        "equal": all(value <= TOLERANCE for value in differences.values())
        and other["evaluated"] == EVALUATED,
        **{
            key: other[key]
            for key in ("ranks", "evaluated", "trained_bytes", "gradient_bytes", "collectives")
        },
    }


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a wire, 10.99.7.1 and 10.99.7.2. Raises OSError where that is not allowed."""
    hosts = (f"hf_lora_a{os.getpid()}", f"hf_lora_b{os.getpid()}")
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host)
            made.append(host)
        _ip(
            "link",
            "add",
            "wire0",
            "netns",
            hosts[0],
            "type",
            "veth",
            "peer",
            "name",
            "wire1",
            "netns",
            hosts[1],
        )
        for number, host in enumerate(hosts):
            _ip("-n", host, "addr", "add", f"10.99.7.{number + 1}/24", "dev", f"wire{number}")
            _ip("-n", host, "link", "set", f"wire{number}", "up")
            _ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def _ip(*words: str) -> None:
    if shutil.which("ip") is None:
        raise OSError("the command ip is not there")
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"ip {' '.join(words)} failed")


def hosts_run(folder: Path) -> dict[str, Any]:
    """DDP with one process on each of two hosts, and the bytes that left the second."""
    _, batch, accumulated, config = RUNS["DDP"]
    with two_hosts() as hosts:
        running = []
        for rank, host in enumerate(hosts):
            order = {"folder": str(folder / f"host{rank}"), "batch": batch, "accumulated": accumulated}
            flags = f"--num_machines 2 --num_processes 2 --machine_rank {rank} --main_process_ip 10.99.7.1"
            words = command(order, config, [*flags.split(), "--main_process_port", "29577"])
            running.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", host, *words],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment(GLOO_SOCKET_IFNAME=f"wire{rank}"),
                )
            )
        errors = [process.communicate()[1] for process in running]
        if any(process.returncode for process in running):
            raise SystemExit(f"two hosts failed:\n{errors[0][-2000:]}\n{errors[1][-2000:]}")
        counted = subprocess.run(
            ["ip", "netns", "exec", hosts[1], "cat", "/sys/class/net/wire1/statistics/tx_bytes"],
            capture_output=True,
            text=True,
        )
        return {**read(folder / "host0"), "wire_bytes": int(counted.stdout)}


def main() -> None:
    """Run all, print tables, write JSON; exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_arguments(parser, plot=False)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(json.loads(options.worker))
        return
    table = report(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {run_name: run(folder, run_name) for run_name in RUNS}
        skipped = None
        try:
            results["two hosts"] = hosts_run(folder)
        except OSError as error:
            skipped = f"two hosts were not run: {error}"
    reference = results["one process"]
    # Accumulated batches hold other examples, of similar length: they have a reference of their own.
    accumulated = results["one process, 2 accumulated"]
    compared = {
        run_name: compare(accumulated if "accumulated" in run_name else reference, result)
        for run_name, result in results.items()
    }
    table(
        f"against one process with as many examples a step, {STEPS} steps (largest relative difference)",
        (
            "run",
            "processes",
            "loss",
            "gradients",
            "adapter",
            "logits",
            f"{EVALUATED} evaluated once",
            "equal to 1e-5",
        ),
        [
            (
                run_name,
                row["ranks"],
                *(f"{row[what]:.1e}" for what in ("loss", "gradients", "adapter", "logits")),
                row["evaluated"],
                "yes" if row["equal"] else "NO",
            )
            for run_name, row in compared.items()
        ],
    )
    table(
        "bytes that a process sends at a step",
        ("run", "trained parameters", "gradients (DDP)", "all collectives"),
        [
            (run_name, row["trained_bytes"], row["gradient_bytes"] or None, json.dumps(row["collectives"]))
            for run_name, row in compared.items()
            if row["ranks"] > 1
        ],
    )
    wire = results.get("two hosts", {}).get("wire_bytes")
    if wire:
        trained = STEPS * reference["trained_bytes"]
        columns = ("bytes on the wire", "trained parameters, once a step", "frozen parameters")
        table("from the second host, the whole run", columns, [(wire, trained, reference["frozen_bytes"])])
    if skipped:
        table("skipped", ("why",), [(skipped,)])
    write_json(options.json, {"runs": compared, "wire_bytes": wire, "skipped": skipped})
    if not all(row["equal"] for row in compared.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
