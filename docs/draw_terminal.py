"""Draws a terminal in which some commands ran, as an SVG.

    python docs/draw_terminal.py DIRECTORY > docs/terminal.svg

The commands run in DIRECTORY, such as demo/ after `make demo`.
"""

import io
import os
import subprocess
import sys

from rich.console import Console
from rich.text import Text

COMMANDS = (
    "scala bench",
    "scala slice --ratio 0.5 -o half --force",
    """python -c "import timm; print(timm.create_model('local-dir:half', pretrained=True).embed_dim)" """,
)
WIDTH = 140

directory = sys.argv[1]
console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
seen = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
for command in COMMANDS:
    console.print(Text(f"$ {command.strip()}", style="bold"))
    done = subprocess.run(
        command, shell=True, cwd=directory, env=seen, stdout=subprocess.PIPE, text=True, check=True
    )
    console.print(Text.from_ansi(done.stdout.rstrip()))
sys.stdout.write(console.export_svg(title="scala"))
