"""Remedies: the core names one, and the command line prints its text."""

import ast
import pickle
import re
from pathlib import Path
from string import Formatter

import pytest
from runs import QUICK

import scala_cli
from scala_cli import errors
from scala_cli.cli.remedies import REMEDIES, advice
from scala_cli.errors import ScalaError, naming_failure
from scala_cli.training.step import Step

ROOT = Path(scala_cli.__file__).parent
CORE = {
    file.relative_to(ROOT): ast.parse(file.read_text())
    for file in sorted(ROOT.rglob("*.py"))
    if "cli" not in file.relative_to(ROOT).parts
}
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ScalaError)]
TYPED = re.compile(r"(?<![\w-])--?[a-z]|\b(scala|hf|docker) [a-z]|\btorchrun\b")
"""An option, or a command."""


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def arguments(function: ast.FunctionDef) -> set[str]:
    return {argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]}


def texts(tree: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def raising() -> set[str]:
    """Returns the names of functions and classes that make an error from a message and a hint."""
    takes_hint = {f.name for tree in CORE.values() for f in functions(tree) if "hint" in arguments(f)}
    return {kind.__name__ for kind in ERRORS} | takes_hint - {"__init__"}


def test_no_error_of_the_core_names_an_option_or_a_command():
    """Neither in the raising call nor in a constant passed to it."""
    makers = raising()
    assert {"refuse_misfit", "naming_failure", "DataError"} <= makers
    for file, tree in CORE.items():
        held = {
            target.id: texts(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in [call for call in calls(tree) if name_of(call) in makers]:
            given = [*call.args, *(word.value for word in call.keywords if word.arg in ("message", "hint"))]
            named = [node.id for each in given for node in ast.walk(each) if isinstance(node, ast.Name)]
            said = [text for each in given for text in texts(each)]
            for text in [*said, *(text for name in named for text in held.get(name, []))]:
                assert not TYPED.search(text), f"{file}:{call.lineno}: {text}"


def remedies_named() -> list[tuple[str, set[str], str]]:
    """Returns (remedy, names of its facts, place) for every call, or default, that names a remedy."""
    found = []
    for file, tree in CORE.items():
        for call in calls(tree):
            given = {word.arg: word.value for word in call.keywords if word.arg}
            if "remedy" in given and isinstance(given["remedy"], ast.Constant):
                facts = given.keys() - {"remedy", "message", "hint", "kind"}
                found.append((given["remedy"].value, facts, f"{file}:{call.lineno}"))
            elif "remedy" in given:  # passed on
                assert ast.unparse(given["remedy"]) == "remedy", f"{file}:{call.lineno}"
        for function in functions(tree):
            named = dict(zip(reversed(function.args.args), reversed(function.args.defaults), strict=False))
            for argument, default in named.items():
                if argument.arg == "remedy":
                    found.append((ast.literal_eval(default), set(), f"{file}:{function.lineno}"))
    return found


def test_every_remedy_has_a_text_that_its_facts_fill():
    for remedy, facts, where in remedies_named():
        assert remedy in REMEDIES, where
        assert {name for _, name, _, _ in Formatter().parse(REMEDIES[remedy]) if name} == facts, where


def test_every_text_is_used():
    assert REMEDIES.keys() == {remedy for remedy, _, _ in remedies_named()}


def test_no_text_names_an_option_that_is_not_there():
    named = {option for text in REMEDIES.values() for option in re.findall(r"--[a-z-]+", text)}
    for tree in CORE.values():
        for call in calls(tree):
            named |= {"--" + ast.literal_eval(w.value) for w in call.keywords if w.arg == "setting"}
    known = (ROOT.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    assert len(named) > 30
    assert {option for option in named if f"`{option}" not in known} == {"--shm-size"}  # docker's


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_goes_through_a_pickle_whole(kind):
    error = kind("it broke.", "Mend it.", remedy="resume", run="runs/one")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == again.message == "it broke."
    assert vars(again) == vars(error)
    assert advice(again) == "Mend it. Resume it: scala finetune --resume runs/one"


def test_the_failure_of_another_library_keeps_its_remedy():
    with (
        pytest.raises(errors.TrainingError, match="it failed: KeyError") as caught,
        naming_failure("it failed", kind=errors.TrainingError, remedy="leave_out", setting="amp"),
    ):
        raise KeyError("x")
    assert advice(caught.value) == "Leave out --amp." and isinstance(caught.value.__cause__, KeyError)


def test_advice_without_a_remedy_is_the_hint():
    assert advice(ScalaError("it broke.")) == ""
    assert advice(ScalaError("it broke.", "Mend it.")) == "Mend it."


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("slice tiny --ratio 0.46", "Try --ratio 0.5, or train it: scala finetune ... --ratios 0.46,..."),
        ("slice tiny --ratio 2", "Give a share of the full width. For example: --ratio 0.5"),
        ("slice tiny --ratio half", "Write 0.5 or 1/2. Several widths are --ratio"),
        ("slice nowhere --ratio 0.5", "Make one: scala convert deit_s -o DIR"),
        ("slice tiny-timm --ratio 0.5", "Convert it first: scala convert local-dir:tiny-timm"),
        ("convert deit_s -o tiny", "Choose another one with -o DIR, or replace it: --force"),
        ("convert tiny-timm --img-size 18", "Try --img-size 16, or another --patch-size."),
        ("convert missing.pth --ema", "Name the file: --weights FILE"),
        ("convert deit_s", "Convert a file you have: scala convert MODEL --weights FILE; or random weights"),
        ("finetune tiny --data digits --method separate", "Give one. For example: --ratios 0.25"),
        ("eval tiny --data digits", "Train a head for them: scala finetune CKPT --data digits; or,"),
        ("eval tiny --data digits --device tpu9", "Try --device "),
    ],
)
def test_the_command_line_says_what_to_type(scala, tiny, words, line):
    answer = scala(*words.split())
    assert answer.code == 2 and line in answer.stderr.splitlines()[-1]


def test_a_run_that_lacks_memory_is_told_both_to_take_less_and_to_go_on(scala, tiny, photos, monkeypatch):
    """Fails in the second step, after the first was saved."""
    real = Step.gather_gradients

    def fail(step, *given):
        if step.number == 1:
            raise MemoryError
        return real(step, *given)

    monkeypatch.setattr(Step, "gather_gradients", fail)
    answer = scala("finetune", tiny, "--data", photos, "-o", "run", "--teacher", "none", *QUICK)
    assert answer.code == 2 and "not enough memory for 4 images at once." in answer.told
    said = f"{REMEDIES['smaller_step']} Then resume: scala finetune --resume run"
    assert answer.stderr.splitlines()[-1] == said
