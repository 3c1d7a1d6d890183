"""How Sphinx makes the documentation site of these pages: `sphinx-build -W -b html docs site`."""

import tomllib
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

project = "mqtts-gateway"
author = "the mqtts-gateway project"
release = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["version"]
version = release

extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"mqtts-gateway {release}"
exclude_patterns = ["examples"]
# Pages link to each other's headings as they do on a code host.
myst_heading_anchors = 4
# A page links to files beside itself, and a link that leads nowhere is an error with `-W`.
nitpicky = True
html_copy_source = False
html_show_sphinx = False
