"""Imports point one way, and files stay small."""

import ast
from pathlib import Path

import scala_cli

ROOT = Path(scala_cli.__file__).parent
LAYERS = [
    {"errors", "with_timm", "__init__"},
    {"settings", "watch", "swap", "lock"},
    {"files"},
    {"slicing"},
    {"models"},
    {"device", "world", "memory", "cost"},
    {"precision", "timing"},
    {"data"},
    {"tasks"},
    {"methods"},
    {"report", "plot", "cascade"},
    {"probe", "evaluate", "formats", "calibration", "explain"},
    {"embeddings"},
    {"bench", "training"},
    {"deploy"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Returns the top-level parts of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), (
            f"{file}: an import by dots hides its place"
        )
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("scala_cli"):
            names = [alias.name for alias in node.names] if node.module == "scala_cli" else []
            found |= {node.module.split(".")[1]} if "." in node.module else set(names)
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("scala_cli.")}
    return found


def test_imports_point_one_way():
    for file in FILES:
        part = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in imported(file) - {"__version__"}:
            if part == "__init__":  # only the public names, for type checkers and on first use
                continue
            assert LEVEL[other] <= LEVEL[part], f"{file.relative_to(ROOT)} imports {other}"


def modules(file: Path) -> set[str]:
    """Returns the full names of the modules that a file imports from."""
    nodes = [*ast.walk(ast.parse(file.read_text()))]
    plain = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_slicing_knows_no_timm():
    for file in (ROOT / "slicing").glob("*.py"):
        assert not any(name.partition(".")[0] == "timm" for name in modules(file)), file


def test_one_file_knows_the_inside_of_timms_models():
    inside = {"timm.layers", "timm.models.vision_transformer"}
    assert [file.name for file in FILES if inside & modules(file)] == ["block.py", "lvvit.py", "vit.py"]


def test_only_the_console_prints():
    for file in FILES:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not any(getattr(call.func, "id", "") == "print" for call in calls), file


def test_files_are_small():
    assert max(len(file.read_text().splitlines()) for file in FILES) <= 400
