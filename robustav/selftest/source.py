"""The package's own source: its modules, and what they import."""

import ast
import importlib.metadata
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path

import robustav

GONE = {"asynchat", "asyncore", "cgi", "cgitb", "crypt", "distutils", "imp", "pipes", "smtpd", "telnetlib"}


def modules() -> list[str]:
    """Every module of the package but the one that runs the command."""
    found = pkgutil.walk_packages(robustav.__path__, "robustav.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


@cache
def imports() -> dict[str, list[str]]:
    """Top-level name of every module that the package's source imports, and the files that do."""
    found: dict[str, list[str]] = {}
    for file in sorted(Path(robustav.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], []).append(file.name)
    return found


def undeclared() -> dict[str, str]:
    """Third-party modules that are imported, by no declared dependency, and a file that does; none in a bare tree."""
    try:
        required = importlib.metadata.requires("robustav") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return {}
    declared = {_plain(re.split(r"[^\w.-]", line)[0]) for line in required}
    owners = importlib.metadata.packages_distributions()
    foreign = {
        name: files[0] for name, files in imports().items() if name not in {*sys.stdlib_module_names, "robustav"}
    }
    return {
        name: file for name, file in foreign.items() if not declared & {_plain(o) for o in owners.get(name, [name])}
    }


def dropped() -> dict[str, str]:
    """Modules of Python's library that are imported although newer Pythons lack them, and a file that does."""
    return {name: files[0] for name, files in imports().items() if name in GONE}


def _plain(distribution: str) -> str:
    return distribution.lower().replace("_", "-")
