"""Makes README.md the first page of the site. A hook of mkdocs; `make site` builds into site/."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

README = Path(__file__).parent.parent / "README.md"


def on_files(files: Files, config: Any) -> Files:
    """Adds README.md as index.md; its links into docs/ become relative to that directory."""
    files.append(
        File.generated(config, "index.md", content=README.read_text("utf-8").replace("](docs/", "]("))
    )
    return files
