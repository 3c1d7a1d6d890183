"""Record the demo as an animated picture: run it, and write what it printed, and when, as SVG.

In: nothing.  Out: `docs/demo.svg`.  Run it as `python docs/record_demo.py` with the gateway and its extra `demo`
installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import wrap

_COMMAND = "mqtts-gateway demo --once"
_PICTURE = Path(__file__).parent / "demo.svg"
_COLUMNS = 112
# Characters in front of what a line of the demo says: who says it.
_SPEAKER = 13
_LINE, _CHARACTER, _MARGIN = 19, 7.85, 16  # pixels
# The first line comes at once; between two of them there is time to read, and not more.
_SHORTEST, _LONGEST = 0.35, 1.2  # seconds
_REST = 8.0  # seconds in which the whole text can be read before it begins again
_COLORS = {"sensor": "#7ee787", "subscriber": "#7ee787", "impostor": "#ffa198", "gateway": "#79c0ff"}


def recorded() -> list[tuple[float, str]]:
    """Run the demo; return its lines, each with the second at which it came."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    words = [sys.executable, "-c", "from gateway.cli.main import console; raise SystemExit(console())"]
    command = [*words, *_COMMAND.split()[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:  # noqa: S603  our own
        lines = [(time.monotonic() - began, line.rstrip("\n")) for line in running.stdout or ()]
    if running.returncode:
        raise SystemExit(running.returncode)
    return lines


def wrapped(line: str) -> list[str]:
    """Break a line of the demo for so many columns; what follows stands below what it says."""
    indent = " " * _SPEAKER
    return wrap(line, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def picture(lines: Sequence[tuple[float, str]]) -> str:
    """Draw the lines, each of which appears at its time, again and again."""
    shown = [(0.0, ["$ " + _COMMAND], "#e6edf3")]
    at, before = 0.6, 0.0
    for second, line in lines:
        at += min(_LONGEST, max(_SHORTEST, second - before))
        before = second
        speaker = line[:_SPEAKER].split()[-1:] or [""]
        shown.append((at, wrapped(line), _COLORS.get(speaker[0], "#8b949e")))
    total = at + _REST
    texts, frames, row = [], [], 0
    for number, (second, parts, color) in enumerate(shown):
        if number:
            hidden = f"{100 * second / total:.2f}"
            frames += [
                f"@keyframes l{number} {{ 0% {{ opacity: 0 }} {hidden}%, 100% {{ opacity: 1 }} }}",
                f".l{number} {{ animation: l{number} {total:.1f}s step-end infinite }}",
            ]
        spans = []
        for part in parts:
            row += 1
            y = _MARGIN + row * _LINE
            indent = len(part) - len(part.lstrip())
            x = _MARGIN + indent * _CHARACTER
            text = escape(part.strip(), quote=False)
            spans.append(f'<tspan x="{x:.1f}" y="{y}">{text}</tspan>')
        texts.append(f'<text class="l{number}" fill="{color}">{"".join(spans)}</text>')
    width, height = round(2 * _MARGIN + _COLUMNS * _CHARACTER), 2 * _MARGIN + (row + 1) * _LINE
    style = "\n".join(
        [
            "text { font: 13px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; white-space: pre }",
            *frames,
            "@media (prefers-reduced-motion: reduce) { text { animation: none !important } }",
        ]
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{_COMMAND}</title>\n<style>\n{style}\n</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n' + "\n".join(texts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    _PICTURE.write_text(picture(recorded()), encoding="utf-8")
