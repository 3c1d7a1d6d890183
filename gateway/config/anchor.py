"""Resolves the paths of a configuration.

In: paths as written, the directory of the file, the service's credentials.  Out: absolute paths.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from attrs import evolve, frozen

_CREDENTIALS = "credentials"


@frozen
class Anchor:
    """Makes paths absolute, so that they mean the same after a daemon has changed its directory.

    Relative paths start at `base`.  Only root can read files in `credentials`: systemd reads them for the service
    (`LoadCredential=credentials:DIRECTORY`, systemd.exec(5)) and puts the file `a/b` into the service's own directory,
    `handed_over`, as `credentials_a_b`.  If that copy exists, it is used.  So the same configuration works for the
    service, which cannot read the original, and for root, who checks it.
    """

    base: Path
    credentials: Path
    handed_over: Path | None

    @classmethod
    def of(cls, base: Path, handed_over: str = "") -> Self:
        """Make the anchor for a configuration in the directory `base`."""
        return cls(base, base / _CREDENTIALS, Path(handed_over) if handed_over else None)

    def moved(self, base: Path) -> Self:
        """Return the anchor of another file of the same configuration."""
        return evolve(self, base=base)

    def __call__(self, path: Path) -> Path:
        """Return the absolute path."""
        absolute = self.base / path
        if self.handed_over is not None:
            plain = Path(os.path.normpath(absolute))
            if plain.is_relative_to(self.credentials) and plain != self.credentials:
                credential = self.handed_over / "_".join((_CREDENTIALS, *plain.relative_to(self.credentials).parts))
                if os.access(credential, os.R_OK):
                    return credential
        return absolute
