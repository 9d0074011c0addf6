"""A HOME for users without one, as containers have them. Nothing here imports torch."""

import os
import tempfile
from pathlib import Path

from powernap.model.errors import PowernapError


class HomeError(PowernapError):
    """There is no HOME and no place for one, in one line."""


def substitute_home() -> Path:
    """Its path, the same in all processes of a user on a machine."""
    return Path(tempfile.gettempdir(), f"powernap-{os.getuid()}")


def provide_home() -> None:
    """Set HOME for this process and its children if the user has none: MLflow cannot be imported without.

    Raises:
        HomeError: if the folder cannot be made, or is another user's, who could leave code there: Triton keeps kernels in HOME.
    """
    if os.path.expanduser("~") != "~":
        return
    home = substitute_home()
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        owner = home.lstat().st_uid
    except OSError as error:
        raise HomeError(f"HOME is not set, and {home} cannot be made ({error.strerror}): set HOME") from None
    if owner != os.getuid():
        raise HomeError(f"HOME is not set, and {home} is another user's: set HOME")
    os.environ["HOME"] = str(home)
