"""Files that the pages in docs/ show in full, each in a code block after `<!-- file: NAME -->`."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def files_of(page: str) -> dict[str, str]:
    """Return the files that a page shows, by their names."""
    text = (DOCS / page).read_text()
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w*\n(.*?)```", text, re.DOTALL))
