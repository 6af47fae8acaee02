"""Walks a folder of a user's files, following links."""

import os
from collections.abc import Iterator
from pathlib import Path

from cascade.errors import UserError


def walked(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders, linked ones included.

    Dangling links are included; macOS's companion files (`._NAME`) are not.

    Raises:
        UserError: a link leads to a folder that is walked already, so that files would count twice
            or without end; or a folder cannot be read.
    """
    entered, left = [folder.resolve()], [folder]
    while left:
        try:
            found = sorted(path for path in left.pop().iterdir() if not path.name.startswith("._"))
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        for path in found:
            if not os.path.isdir(path):
                yield path
                continue
            if path.is_symlink():
                real = path.resolve()
                if any(real.is_relative_to(e) or e.is_relative_to(real) for e in entered):
                    raise UserError(
                        f"{path} is a link to {real}, which is in {folder} already: remove the link"
                    )
                entered.append(real)
            left.append(path)
