"""One training step under hf_lora, under peft, and the bound (the frozen network with activation gradients only).

"hf_lora" leaves out what the classifier does not read in the last block; "whole block" computes it, as the others do.

    python scripts/benchmarks/step.py --json step.json --plot step.png

Paired: all sides live in one process and take turns; medians of times and of ratios. Peak memory is measured
in processes of their own. The sweeps show how the cost grows with tokens, rank and adapted blocks.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict, replace
from typing import Any

import torch
from harness import (
    add_output_arguments,
    in_process,
    machine,
    paired,
    peak_mb,
    report,
    reset_peak,
    resident_mb,
    summary,
    timed,
    write_json,
)
from sides import STEPS, Case

from hf_lora.lora.functional import lora_linear

CASES = [
    Case(shape, precision, dropout, batch, length)
    for shape, batch, length in (("minilm", 16, 128), ("bert-base", 8, 64))
    for precision in ("fp32", "bf16")
    for dropout in (0.0, 0.1)
]
SWEPT = Case("minilm", "bf16", 0.1, 16, 128)
RATIOS = ("hf_lora/peft", "hf_lora/bound", "whole block/bound")
SWEEPS: dict[str, list[Case]] = {
    "tokens": [replace(SWEPT, batch=batch) for batch in (2, 4, 8, 16, 32)],
    "rank": [replace(SWEPT, rank=rank) for rank in (2, 8, 32, 128)],
    "layers": [replace(SWEPT, layers=layers) for layers in (1, 2, 4, 6)],
}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Milliseconds of each side, and the ratios to peft and to the bound, round by round."""
    steps = {name: make(case) for name, make in STEPS.items()}
    for step in steps.values():
        step()
    times = paired(steps, rounds)
    del steps
    gc.collect()
    milliseconds = {name: [1000 * second for second in seconds] for name, seconds in times.items()}
    to_peft, to_bound = (summary(milliseconds, reference=side) for side in ("peft", "bound"))
    return {
        **asdict(case),
        "ms": summary(milliseconds),
        "hf_lora/peft": to_peft["hf_lora"]["ratio"],
        **{f"{side}/bound": to_bound[side]["ratio"] for side in ("hf_lora", "whole block", "peft")},
    }


def siblings(rounds: int) -> dict[str, Any]:
    """q, k and v of one MiniLM block as three adapted products and as one: milliseconds, forward and backward.

    As one: the frozen weights stacked, and the factors as blocks of one update of three times the rank.
    """
    width, rank, tokens = 384, SWEPT.rank, SWEPT.batch * SWEPT.length
    weights = [torch.randn(width, width, dtype=torch.bfloat16) for _ in "qkv"]
    factors = [(torch.randn(rank, width), torch.randn(width, rank)) for _ in "qkv"]
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    stacked = torch.cat([A for A, _ in factors]).requires_grad_()
    blocks = torch.block_diag(*(B for _, B in factors)).requires_grad_()
    factors = [(A.requires_grad_(), B.requires_grad_()) for A, B in factors]
    whole = torch.cat(weights)

    def apart() -> None:
        products = [lora_linear(x, W, None, A, B, 2.0) for W, (A, B) in zip(weights, factors, strict=True)]
        torch.autograd.backward(products, [p.detach() for p in products])

    def together() -> None:
        product = lora_linear(x, whole, None, stacked, blocks, 2.0)
        product.backward(product.detach())

    sides = {"apart": apart, "together": together}
    for side in sides.values():
        side()
    times = paired({name: timed(side) for name, side in sides.items()}, 10 * rounds)
    return summary({name: [1000 * s for s in seconds] for name, seconds in times.items()}, reference="apart")


def memory(side: str, case: Case) -> dict[str, float]:
    """Resident megabytes of this process before a first step, and the most that five steps need beyond."""
    step = STEPS[side](case)
    gc.collect()
    before = resident_mb()
    reset_peak()
    for _ in range(5):
        step()
    peak = peak_mb()
    return {"before_mb": before, "peak_mb": peak, "steps_mb": peak - before}


def main() -> None:
    """Measure, print tables, write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="paired steps for each case (default: 5)")
    parser.add_argument("--no_sweeps", action="store_true", help="leave the sweeps out")
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        side, case = options.memory
        print(json.dumps(memory(side, Case(**json.loads(case)))))
        return
    table = report(options)
    result: dict[str, Any] = {"machine": machine(), "cases": [], "memory": [], "sweeps": {}}
    for case in CASES:
        result["cases"].append(measure(case, options.rounds))
    table(
        "one step (ms, median)",
        ("shape", "precision", "dropout", "tokens", *STEPS, *RATIOS),
        [
            (
                *(c["shape"], c["precision"], c["dropout"], c["batch"] * c["length"]),
                *(f"{c['ms'][side]['median']:.0f}" for side in STEPS),
                *(f"{c[ratio]:.2f}" for ratio in RATIOS),
            )
            for c in result["cases"]
        ],
    )
    for case in (c for c in CASES if c.dropout):
        sides = {
            side: in_process([sys.executable, __file__, "--memory", side, json.dumps(asdict(case))])
            for side in STEPS
        }
        result["memory"].append({**asdict(case), "mb": sides})
    table(
        "memory of the steps beyond the loaded model (MB)",
        ("shape", "precision", "dropout", *STEPS, "hf_lora/peft"),
        [
            (
                *(c["shape"], c["precision"], c["dropout"]),
                *(f"{c['mb'][side]['steps_mb']:.0f}" for side in STEPS),
                f"{c['mb']['hf_lora']['steps_mb'] / c['mb']['peft']['steps_mb']:.2f}",
            )
            for c in result["memory"]
        ],
    )
    for name, cases in {} if options.no_sweeps else SWEEPS.items():
        result["sweeps"][name] = [measure(case, options.rounds) for case in cases]
        table(
            f"one step (ms, median) by {name}",
            (name, *STEPS, "hf_lora/peft", "hf_lora/bound"),
            [
                (
                    swept_value(name, c),
                    *(f"{c['ms'][side]['median']:.0f}" for side in STEPS),
                    *(f"{c[ratio]:.2f}" for ratio in ("hf_lora/peft", "hf_lora/bound")),
                )
                for c in result["sweeps"][name]
            ],
        )
    result["siblings"] = siblings(options.rounds)
    saved = result["siblings"]["apart"]["median"] - result["siblings"]["together"]["median"]
    own = next(
        c for c in result["cases"] if (c["shape"], c["precision"], c["dropout"]) == ("minilm", "bf16", 0.1)
    )
    result["siblings"]["share_of_step"] = 6 * saved / own["ms"]["hf_lora"]["median"]
    table(
        "q, k, v of a block (ms)",
        ("three products", "one product", "saved, share of a step"),
        [
            (
                *(f"{result['siblings'][side]['median']:.2f}" for side in ("apart", "together")),
                f"{result['siblings']['share_of_step']:.3f}",
            )
        ],
    )
    if options.plot:
        plot(result["sweeps"], options.plot)
    write_json(options.json, result)


def swept_value(name: str, case: dict[str, Any]) -> int:
    """What a sweep varies, of one of its cases."""
    return case["batch"] * case["length"] if name == "tokens" else case[name]


def plot(sweeps: dict[str, list[dict[str, Any]]], path: str) -> None:
    """A panel for each sweep: milliseconds of each side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(sweeps), figsize=(4.2 * len(sweeps), 3.6), constrained_layout=True)
    for panel, (name, cases) in zip(panels, sweeps.items(), strict=True):
        values = [swept_value(name, case) for case in cases]
        for side in STEPS:
            panel.plot(values, [case["ms"][side]["median"] for case in cases], marker="o", label=side)
        panel.set_xlabel({"tokens": "tokens in the batch", "rank": "rank", "layers": "adapted blocks"}[name])
        panel.set_ylim(bottom=0)
        if name != "layers":
            panel.set_xscale("log", base=2)
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms for one training step")
    panels[0].legend()
    figure.suptitle("MiniLM, bf16, all dropouts 0.1; otherwise 2,048 tokens, rank 8, 6 blocks")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
