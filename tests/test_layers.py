"""The shape of the code itself: imports go downward or sideways, never in a cycle, and files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "criadero"
# docs/architecture.md, "Layers": lowest first
LAYERS = [
    {"errors", ""},  # "" is criadero/__init__.py: its public names are imported behind __getattr__
    {"artifact", "recipe", "passport", "merkle", "machine", "places"},
    {"config", "tokenizer", "sentencepiece_file", "template_sandbox", "chat", "kernels"},
    {"model", "lora", "quant_linear", "checkpoints", "data", "card"},
    {"train", "engine", "quantization", "merge"},
    {"trust", "synth"},
    {"run", "demo", "terminal", "summary", "export"},
    {"serve"},
    {"cli", "cli_passport", "cli_trace", "cli_serve", "cli_store", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file) for file in FILES}


def imports_of(file: Path, *, top_only: bool = False) -> set[str]:
    """The criadero modules that a file imports, anywhere in it or only when it is itself imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        lazy |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if top_only and lazy:
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {name for name in found if name.split(".")[0] == "criadero"}


def layer(module: str) -> int:
    part = [*module.split("."), ""][1]
    assert part in RANK, f"{module}: say in docs/architecture.md and here to which layer {part!r} belongs"
    return RANK[part]


@pytest.mark.parametrize("file", FILES, ids=[module_of(file) for file in FILES])
def test_imports_go_downward_or_sideways(file: Path) -> None:
    here = layer(module_of(file))
    up = sorted(name for name in imports_of(file) if layer(name) > here)
    assert not up, f"{module_of(file)} imports from above: {', '.join(up)}"


def test_no_cycles() -> None:
    graph = {module_of(file): imports_of(file, top_only=True) - {module_of(file)} for file in FILES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "a cycle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph.get(module, ())):
                walk(name, (*path, module))
            done.add(module)

    for module in sorted(graph):
        walk(module, ())


@pytest.mark.parametrize("file", FILES, ids=[module_of(file) for file in FILES])
def test_file_length(file: Path) -> None:
    budget = 400 if file.name == "model.py" else 800
    assert len(file.read_text(encoding="utf-8").splitlines()) <= budget


def test_model_imports_torch_only() -> None:
    tree = ast.parse((PACKAGE / "model.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"torch"}
    assert foreign <= {"criadero"}
    assert {name for name in names if name.startswith("criadero")} <= {"criadero.errors", "criadero.config"}


@pytest.mark.parametrize(
    "module", ["criadero", "criadero.cli", "criadero.run", "criadero.artifact", "criadero.summary"]
)
def test_what_must_import_fast_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'tokenizers', 'numpy', 'jinja2'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
