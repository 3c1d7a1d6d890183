"""Fuzzers: each feeds a part of the gateway with bytes and judges what comes of them.

In: bytes.  Out: nothing, or `AssertionError` from a target's `check`.  `python -m tests.fuzz` runs them under atheris;
`tests/test_fuzz.py` runs `check` on the corpus alone, without atheris.

A target is a module with `check(data)`; `SEEDS`, the inputs to begin with; and `FAULTS`, functions that break the
gateway in ways that `check` must notice.  `tests/fuzz/corpus/TARGET/` has more inputs: those that once found something.
"""

TARGETS = ("config", "connect", "csv_import", "framer", "inspector", "proxy_header", "site")
