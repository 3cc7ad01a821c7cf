"""Files beside docs/ that pages link to become part of the site: ../config/x is found at files/config/x.txt there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what any page links to; a file that is not there is left to be complained of."""
    pages = [ROOT / "docs" / page.src_uri for page in files.documentation_pages()]
    for name in sorted({name for page in pages for name in OUTSIDE.findall(page.read_text("utf-8"))}):
        if (ROOT / name).is_file():
            files.append(File.generated(config, f"files/{name}.txt", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"](files/\1.txt)", markdown)
