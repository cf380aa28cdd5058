"""A bank of up to 1,000 classifiers on one encoder: CPU time, memory, adding, and one text through many of them.

    python scripts/benchmarks/bank.py --json bank.json --plot bank.png

The encoder is MiniLM, the adapters have random updates of rank 8 in q, k, v and o. Against the encoder without
adapters, peft's mixed batches, merged copies, and one TextClassifier after the other. The sides take turns in one
process; memory is measured in processes of their own. Times are CPU times of the process: others on the machine
disturb them least. `--of FILE` prints and draws results again.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import bank_sides as sides
import torch
import transformers
from bank_report import plot, print_tables, targets
from data_sets import BASE, bbc_sentences
from harness import (
    add_output_arguments,
    in_process,
    machine,
    paired,
    peak_mb,
    report,
    resident_mb,
    summary,
    write_json,
)

from hf_lora import AdapterBank, TextClassifier

TOP_BLOCKS = (-2, -1)


@dataclass(frozen=True)
class Plan:
    """What is measured. rounds: by the tokens of a sequence. fan_out: classifiers of one text, and their tokens."""

    precisions: tuple[str, ...] = ("fp32", "bf16")
    sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1000)
    rounds: Mapping[int, int] = field(default_factory=lambda: {16: 11, 32: 9, 128: 4})
    peers: tuple[int, ...] = (1, 4, 16, 32)
    held: tuple[int, ...] = (1, 16, 256, 1000)
    fan_out: int = 64
    fan_out_tokens: tuple[int, ...] = (32, 128)
    texts: int = 128
    few_rounds: int = 3
    added: int = 20


QUICK = Plan(("fp32",), (1, 64), {16: 2, 32: 2}, (1, 8), (16,), 8, (32,), 32, 2, 5)


def compared(
    acts: Mapping[str, Callable[[], object]], rounds: int, *references: str
) -> dict[str, dict[str, dict[str, float]]]:
    """CPU milliseconds and seconds of acts that take turns, and the medians of the ratios to the references."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}

    def side(name: str) -> float:
        start, cpu = time.perf_counter(), time.process_time()
        acts[name]()
        cpu = time.process_time() - cpu
        seconds[name].append(time.perf_counter() - start)
        return 1000 * cpu

    for act in acts.values():
        act()
    with _no_collection():
        figures = paired({name: partial(side, name) for name in acts}, rounds)
    ratios = {
        other: {name: row["ratio"] for name, row in summary(figures, other).items()} for other in references
    }
    return {"cpu_ms": summary(figures), "seconds": summary(seconds), "ratios": ratios}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, no side is stopped for garbage of another."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def passes(places: Sequence[Path], precision: str, plan: Plan) -> dict[str, Any]:
    """Passes of 32 sequences with random adapters, as the bank grows; predictions and adding with all of them."""
    bank, plain = sides.new_bank(places[0], precision), sides.plain_model(precision)
    rows: list[dict[str, Any]] = []
    for size in plan.sizes:
        sides.grow(bank, places, size)
        batches = [sides.drawn(size, seed=seed) for seed in range(sides.DRAWS)]
        for tokens, rounds in plan.rounds.items():
            inputs = sides.token_inputs(tokens)
            acts = {"plain": sides.plain_side(plain, inputs), "bank": sides.bank_side(bank, inputs, batches)}
            figures = compared(acts, rounds, "plain")
            rows.append({"precision": precision, "adapters": size, "tokens": tokens, **figures})
    result = {"passes": rows, "predictions": predictions(bank, places[0], precision, plan)}
    return {**result, "adding": adding(bank, places, precision, plan.added)}


def predictions(bank: AdapterBank, place: Path, precision: str, plan: Plan) -> dict[str, Any]:
    """Sentences by one adapter, merged or in the bank, and each by a random one of the bank's."""
    texts = [text for text, _ in bbc_sentences(plan.texts)]
    classifier = TextClassifier.from_pretrained(place, precision=precision, device="cpu")
    names, draw = list(bank.adapters), random.Random(0)
    acts = {
        "TextClassifier, merged": lambda: classifier.predict(texts),
        "bank, one adapter": lambda: bank.predict(texts, "0"),
        "bank, random adapters": lambda: bank.predict(texts, draw.choices(names, k=len(texts))),
    }
    tokens = [len(ids) for ids in classifier.tokenizer(texts)["input_ids"]]
    return {
        "precision": precision,
        "adapters": len(names),
        "texts": len(texts),
        "mean_tokens": sum(tokens) / len(tokens),
        **compared(acts, plan.few_rounds, "TextClassifier, merged"),
    }


def adding(bank: AdapterBank, places: Sequence[Path], precision: str, times: int) -> dict[str, Any]:
    """Milliseconds to add the last adapter to the others, and to predict 32 texts by others meanwhile."""
    last = len(bank.adapters) - 1
    texts = sides.texts_of(bank._loader.tokenizer, 32, sides.BATCH)
    names = [str(number) for number in sides.drawn(last)]
    batches: list[float] = []
    stop = threading.Event()

    def predict() -> None:
        while not stop.is_set():
            batches.append(_milliseconds(partial(bank.predict, texts, names)))

    def add() -> float:
        bank.remove(str(last))
        return _milliseconds(partial(bank.add, places[last], str(last)))

    bank.predict(texts, names)
    alone = [add() for _ in range(times)]
    thread = threading.Thread(target=predict)
    thread.start()
    while len(batches) < times:
        time.sleep(0.01)
    before, beside = len(batches), list[float]()
    for _ in range(times):
        beside.append(add())
        # Adapters come one by one, at any time of a batch.
        time.sleep(0.7 * batches[0] / 1000)
    stop.set()
    thread.join()
    return {
        "precision": precision,
        "adapters": last + 1,
        "ms": {**summary({"alone": alone}), **summary({"beside batches": beside})},
        "batch_ms": {**summary({"alone": batches[:before]}), **summary({"beside adding": batches[before:]})},
    }


def _milliseconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return 1000 * (time.perf_counter() - start)


def peers(places: Sequence[Path], plan: Plan) -> list[dict[str, Any]]:
    """32 sequences of 32 tokens, evenly for some adapters of two labels, by all who can mix them."""
    bank, plain = sides.new_bank(places[0], "fp32"), sides.plain_model("fp32", sides.NATIVE)
    classifiers = [TextClassifier.from_pretrained(place, precision="fp32", device="cpu") for place in places]
    inputs, texts = sides.token_inputs(32), sides.texts_of(classifiers[0].tokenizer, 32, sides.BATCH)
    found = []
    for count in plan.peers:
        sides.grow(bank, places, count)
        rows = sides.spread_evenly(count)
        acts: dict[str, Callable[[], Any]] = {
            "plain": sides.plain_side(plain, inputs),
            "bank": sides.bank_side(bank, inputs, [rows]),
            "peft": sides.peft_side(places[:count], inputs, rows),
            "merged copies": sides.copies_side(classifiers, inputs, rows),
        }
        from_texts: dict[str, Callable[[], Any]] = {
            "bank": partial(bank.predict, texts, [str(row) for row in rows]),
            "one TextClassifier after the other": sides.one_after_the_other(classifiers, texts, rows),
        }
        expected = acts["merged copies"]()
        found.append(
            {
                **{"precision": "fp32", "adapters": count, "tokens": 32},
                **compared(acts, plan.rounds[32], "plain", "peft"),
                "differences": {
                    "bank": float((acts["bank"]()[0] - expected).abs().max()),
                    "peft": float((acts["peft"]() - expected).abs().max()),
                },
                "predict": compared(from_texts, plan.few_rounds, "bank"),
            }
        )
    return found


def fan_out(places: Sequence[Path], blocks: str, plan: Plan) -> list[dict[str, Any]]:
    """One text by many classifiers against one, in fp32. blocks: those that the adapters are in, for people."""
    bank = sides.new_bank(places[0], "fp32")
    sides.grow(bank, places, plan.fan_out)
    classifier = TextClassifier.from_pretrained(places[0], precision="fp32", device="cpu")
    found = []
    for tokens in plan.fan_out_tokens:
        [text] = sides.texts_of(classifier.tokenizer, tokens, 1)
        logits: dict[str, Callable[[], Any]] = {
            "one": partial(classifier.logits, [text]),
            "all": sides.fan_out_side(bank, text),
        }
        answers: dict[str, Callable[[], Any]] = {
            "one": partial(classifier.predict, text),
            "all": partial(bank.predict, text, "*"),
        }
        found.append(
            {
                **{"precision": "fp32", "blocks": blocks, "tokens": tokens, "classifiers": plan.fan_out},
                "logits": compared(logits, plan.few_rounds, "one"),
                "answers": compared(answers, plan.few_rounds, "one"),
            }
        )
    return found


def memory(folder: str, count: int, precision: str) -> dict[str, float]:
    """Megabytes of this process with a bank of `count` adapters, after a batch, and the most until then."""
    places = [Path(folder) / str(index) for index in range(count)]
    bank = sides.new_bank(places[0], precision)
    sides.grow(bank, places, count)
    texts = sides.texts_of(bank._loader.tokenizer, 32, sides.BATCH)
    bank.predict(texts, [str(number) for number in sides.drawn(count)])
    gc.collect()
    return {"resident_mb": resident_mb(), "peak_mb": peak_mb()}


def _memory_command(folder: Path, count: int, precision: str) -> list[str]:
    return [sys.executable, __file__, "--memory", str(folder), str(count), precision]


def measure(folder: Path, plan: Plan, heads: str) -> dict[str, Any]:
    """All figures."""
    count = max(*plan.sizes, *plan.held, plan.fan_out)
    tenants = sides.write_adapters(folder / "tenants", count, heads)
    pairs = sides.write_adapters(folder / "pairs", max(plan.peers), sides.NATIVE, labels=2)
    top = sides.write_adapters(folder / "top", plan.fan_out, heads, layers=TOP_BLOCKS)
    grown = [passes(tenants, precision, plan) for precision in plan.precisions]
    gc.collect()
    return {
        "passes": [row for part in grown for row in part["passes"]],
        "predictions": [part["predictions"] for part in grown],
        "adding": [part["adding"] for part in grown],
        "peers": peers(pairs, plan),
        "fan_out": [*fan_out(tenants, "all six", plan), *fan_out(top, "the top two", plan)],
        "memory": [
            {
                **{"precision": precision, "adapters": held},
                **in_process(_memory_command(folder / "tenants", held, precision)),
            }
            for precision in plan.precisions
            for held in plan.held
        ],
    }


def settings(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """What was on."""
    return {
        "model": BASE,
        "rank": sides.RANK,
        "projections": "qkvo",
        "labels": "2 to 6",
        "heads": options.heads,
        "sequences": sides.BATCH,
        "threads": torch.get_num_threads(),
        "quick": options.quick,
        **asdict(plan),
    }


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_output_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="few adapters and rounds: less than a minute")
    parser.add_argument("--threads", type=int, default=1, help="threads of a pass (default: 1)")
    parser.add_argument(
        "--heads", choices=("mean", "native", "mixed"), default="mean", help="of the adapters (default: mean)"
    )
    parser.add_argument(
        "--of", metavar="FILE", help="print and draw the results of that file; nothing is run"
    )
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print tables, write JSON and a plot."""
    options = parsed()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # peft's modules draw warnings that say nothing here.
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory:
        folder, count, precision = options.memory
        print(json.dumps(memory(folder, int(count), precision)))
        return
    if options.of:
        result = json.loads(Path(options.of).read_text(encoding="utf-8"))
    else:
        plan, start = QUICK if options.quick else Plan(), time.perf_counter()
        result = {"machine": machine(), "settings": settings(plan, options)}
        with tempfile.TemporaryDirectory() as folder:
            result |= measure(Path(folder), plan, options.heads)
        result["seconds"] = time.perf_counter() - start
        result["targets"] = targets(result)
    print_tables(result, report(options))
    if options.plot:
        plot(result, options.plot)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
