"""Makes README.md and CONTRIBUTING.md pages of the site. A hook of mkdocs; `make site` builds into site/."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages; their links into docs/ become relative to that directory."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text("utf-8").replace("](docs/", "](")
        text = text.replace("](CONTRIBUTING.md", "](contributing.md")
        files.append(File.generated(config, page, content=text))
    return files
