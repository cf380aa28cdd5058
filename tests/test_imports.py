"""Imports point one way: a module imports only from levels before its own. Read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_lora"
LEVELS = (
    ("version", "registry", "atomic", "arguments", "common_arguments", "tables", "untrusted", "processes"),
    ("adapter_arguments", "export_arguments", "insight_arguments", "sweep_arguments"),
    ("sidecar", "checkpoints", "preemption", "launching", "hub_errors"),
    ("temperature",),
    ("predictions",),
    ("lr_rule", "restoring"),
    (
        "dropout",
        "fingerprint",
        "bundled",
        "precision",
        "class_weights",
        "prefix_store",
        "probing",
        "snapshot",
    ),
    ("training_arguments",),
    ("batching", "collation", "evaluation_order"),
    ("batch_plan",),
    ("functional", "kernels", "attention", "first_token"),
    ("acceleration",),
    ("architectures", "fused", "initializers", "layouts", "pooling"),
    ("pooling_choice",),
    ("update",),
    ("config",),
    ("layers", "parametrization"),
    ("head",),
    ("guess", "quantized"),
    ("targets",),
    ("inject",),
    ("prefix",),
    ("prefix_cache", "sharding", "parameter_groups"),
    ("peft_format",),
    ("tensors",),
    ("checkpoint",),
    ("hub",),
    ("checkpointing",),
    ("adapter_values",),
    ("spectra",),
    ("inspection",),
    ("overview",),
    ("heat_maps",),
    ("arithmetic",),
    ("extract",),
    ("data", "modeling", "verify"),
    ("losses",),
    ("probe",),
    ("metric_classes", "curves"),
    ("metrics", "model_card", "lr_range_plot"),
    ("judgement",),
    ("charts", "report"),
    ("pages",),
    ("gradient_start",),
    ("trainer",),
    ("warm_start", "lr_range"),
    ("safeguard", "baselines", "evaluations"),
    ("refit",),
    ("parsing", "run_settings", "run_directory", "results"),
    ("inference",),
    ("labelled",),
    ("onnx_classifier",),
    ("export",),
    ("training",),
    ("run_series",),
    ("sweep_results", "series_progress"),
    ("sweep", "learning_curve"),
    ("learning_curve_plot",),
    ("commands", "adapter_commands", "hub_commands"),
    ("export_commands", "insight_commands", "sweep_commands", "learning_curve_commands"),
    ("cli",),
    ("__init__",),
)
RANK = {module: rank for rank, modules in enumerate(LEVELS) for module in modules}
MODULES = sorted({path.stem for path in PACKAGE.glob("*.py")} | {"data"})


def imported_by(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file, by their first name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_lora":
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hf_lora.")}
    return names


def test_every_module_has_a_level():
    assert set(MODULES) == set(RANK)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_earlier_levels(module):
    paths = (PACKAGE / "data").glob("*.py") if module == "data" else [PACKAGE / f"{module}.py"]
    imported = set().union(*map(imported_by, paths)) - {module}
    assert imported <= set(RANK), imported - set(RANK)
    assert not {name for name in imported if RANK[name] >= RANK[module]}


def test_the_package_never_imports_its_test_oracles():
    sources = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    imported = {
        name.name.split(".")[0] if isinstance(node, ast.Import) else (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(sources))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert not imported & {"peft", "loralib", "adapters"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_is_long(path):
    assert len(path.read_text().splitlines()) <= 300


def test_importing_the_package_imports_nothing_heavy():
    code = "import hf_lora, sys; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_resolves():
    import hf_lora

    for name in hf_lora.__all__:
        assert getattr(hf_lora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_lora.nothing  # noqa: B018
