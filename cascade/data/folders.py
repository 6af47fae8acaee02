"""A folder of files as its owner sees it: links stand for what they lead to."""

import os
from collections.abc import Iterator
from pathlib import Path

from cascade.errors import UserError


def walked(folder: Path) -> Iterator[Path]:
    """All that is in a folder and in those below it, linked ones too, but for folders themselves.

    Links that lead nowhere are among them. What a Mac leaves beside each file (`._NAME`) is not.

    Raises:
        UserError: a linked folder holds what is walked through already, which would count twice or
            without end; or a folder cannot be read.
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
