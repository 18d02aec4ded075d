"""The package as it is installed: everything imports, and nothing is imported that is not declared."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import robustav

PACKAGE = Path(robustav.__file__).parent
PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
DISTRIBUTIONS = {"sklearn": "scikit-learn", "lightning_fabric": "lightning-fabric"}
MODULES = sorted(name for _, name, _ in pkgutil.walk_packages(robustav.__path__, "robustav.") if "__main__" not in name)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    importlib.import_module(name)


def test_every_import_is_declared():
    """V6: a package that is imported but not declared is missing on somebody's machine."""
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    declared = set(re.findall(r'"([\w-]+)', block))
    imported = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    third_party = {DISTRIBUTIONS.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"robustav"}}
    assert third_party == declared


def test_importing_everything_opens_no_connection_and_no_optional_package():
    code = (
        "import importlib, socket, sys\n"
        "def refuse(*_): raise AssertionError('a connection at import')\n"
        "socket.socket.connect = refuse\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        "sys.exit(bool({'torchaudio', 'torchvision', 'torchattacks', 'art', 'transformers', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_constraints_pin_what_is_declared():
    """Every core dependency has an exact version in both lanes."""
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    for file in ("constraints.txt", "constraints-extras.txt"):
        pinned = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
        for name in re.findall(r'"([\w-]+)', block):
            assert re.search(rf"^{re.escape(name)}==\d", pinned, re.MULTILINE), f"{file} lacks {name}"
