"""Text files are read and written as UTF-8 in any locale."""

import ast
from pathlib import Path

import pytest

import scala_cli

ROOT = Path(scala_cli.__file__).parent


def text_without_encoding(tree: ast.AST) -> list[int]:
    """Returns the lines that open, read or write text in the locale's encoding."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        before_mode = {"open": int(isinstance(call.func, ast.Name)), "fdopen": 1}.get(name)
        if "encoding" in given or (name == "read_text" and call.args):
            continue
        if before_mode is not None:
            rest = call.args[before_mode:]
            mode = given.get("mode", rest[0] if rest else ast.Constant("r"))
            is_path = before_mode or not call.args or isinstance(call.args[0], ast.Constant)
            if is_path and not (isinstance(mode, ast.Constant) and "b" in mode.value):
                found.append(call.lineno)
        text = given.get("text", given.get("universal_newlines"))
        if name in ("read_text", "write_text") or getattr(text, "value", False):
            found.append(call.lineno)
    return found


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("file.read_text()", True),
        ("file.read_text('utf-8')", False),
        ("file.write_text('é')", True),
        ("file.write_text('é', encoding='utf-8')", False),
        ("open(file)", True),
        ("open(file, 'rb')", False),
        ("open(file, mode='w')", True),
        ("file.open()", True),
        ("file.open('w', newline='')", True),
        ("file.open('wb')", False),
        ("Image.open(file)", False),
        ("os.open(file, os.O_RDONLY)", False),
        ("os.fdopen(handle, 'w')", True),
        ("subprocess.run(words, text=True)", True),
    ],
)
def test_how_text_without_encoding_is_found(code, is_found):
    assert bool(text_without_encoding(ast.parse(code))) is is_found


def test_text_is_utf8_whatever_the_locale():
    found = {
        str(file.relative_to(ROOT)): lines
        for file in ROOT.rglob("*.py")
        if (lines := text_without_encoding(ast.parse(file.read_text(encoding="utf-8"))))
    }
    assert not found
