"""Prints docs/cli.md, from the commands themselves. Run by `make docs`; a test compares."""

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from scala_cli.cli.app import app

COMMON = """Every command takes `-h` (help), `--json` (the result as one JSON document on stdout),
`-q` (the result alone) and `--debug` (the traceback of an error). Progress and notes go to stderr.

Exit codes: 0 done, 2 something the user can mend (one or two lines say what), 130 interrupted
(143 by SIGTERM), 1 a bug of ours."""


def reference() -> str:
    root: Any = typer.main.get_command(app)
    parts = [f"# The commands\n\n{root.help}\n\n{COMMON}"]
    parts += [section(name, command) for name, command in root.commands.items()]
    return "\n\n".join(parts) + "\n"


def section(name: str, command: Any) -> str:
    text, _, example = command.help.partition("Example: ")
    (callback,) = [each.callback for each in app.registered_commands if each.name == name]
    hints = get_type_hints(callback)
    rows = [
        row(p, choices_of(hints[p.name]))
        for p in command.params
        if p.name not in ("json", "quiet", "debug", "help")
    ]
    return "\n".join(
        [
            f"## scala {name}\n",
            f"{text.strip()}\n",
            f"```\n{example.strip()}\n```\n",
            "| option | what it is | default |",
            "|---|---|---|",
            *rows,
        ]
    )


def row(parameter: Any, choices: Sequence[str]) -> str:
    if parameter.param_type_name == "argument":
        names = parameter.metavar or parameter.name.upper()
    else:
        names = ", ".join(opt for opt in [*parameter.opts, *parameter.secondary_opts] if opt.strip())
    names = names.replace("|", "\\|")
    default = parameter.default
    shown = "" if default is None or isinstance(default, bool) else str(default)
    text = f"{parameter.help} One of {', '.join(choices)}." if choices else parameter.help
    return f"| `{names}` | {text} | {shown} |"


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal, wherever in the annotation it stands."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in choices_of(part))


if __name__ == "__main__":
    print(reference(), end="")
