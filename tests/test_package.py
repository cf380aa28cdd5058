"""The shape of the package: layers, sizes, what importing it costs, and its public names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_lora"


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of a checkout."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_imports_point_down():
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout


def test_an_upward_import_is_noticed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "hf_lora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "hf_lora" / "lora" / "config.py").open("a") as stream:
        stream.write("\nfrom hf_lora.serving import classifier  # noqa\n")
    run = lint_imports(tmp_path)
    assert run.returncode == 1
    assert "hf_lora.lora.config -> hf_lora.serving.classifier" in run.stdout


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_is_long(path):
    assert len(path.read_text().splitlines()) <= 300


def test_no_room_is_crowded():
    rooms = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    sizes = {room.name: len(set(room.glob("*.py")) - {room / "__init__.py"}) for room in rooms}
    assert max(sizes.values()) <= 10, sizes
    assert len(list(PACKAGE.glob("*.py"))) <= 5


def test_a_wheel_has_every_room():
    line = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "packages = [" in line)
    rooms = {f"hf_lora.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(json.loads(line.partition("=")[2])) - {"hf_lora", "hf_lora.accelerate_configs"}


@pytest.mark.parametrize("argv", [[], ["--help"], ["train", "--help"], ["--version"]], ids=" ".join)
def test_the_package_and_its_help_import_nothing_heavy(argv):
    code = "import contextlib, io, sys; import hf_lora\n"
    if argv:
        code += "from hf_lora.cli.main import main\n"
        code += (
            f"with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main({argv})\n"
        )
    code += "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_resolves():
    import hf_lora

    for name in hf_lora.__all__:
        assert getattr(hf_lora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_lora.nothing  # noqa: B018
