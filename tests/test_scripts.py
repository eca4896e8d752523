"""The scripts, which no type checker reads, name modules and functions of merger that exist."""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "scripts").glob("*.py"))


def resolve(module_name, name):
    """What ``from module_name import name`` binds; AttributeError or ImportError where there is no such thing."""
    module = importlib.import_module(module_name)
    return getattr(module, name) if hasattr(module, name) else importlib.import_module(f"{module_name}.{name}")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_uses_what_there_is(path):
    tree = ast.parse(path.read_text())
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "merger":
            values = {alias.asname or alias.name: resolve(node.module, alias.name) for alias in node.names}
            modules |= {name: value for name, value in values.items() if isinstance(value, ModuleType)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{path.name}:{node.lineno}: {node.attr}"
