"""How a command ends, when not well: each kind is one line on the terminal and an exit code."""


class UserError(Exception):
    """Bad configuration or input: exit code 2. The message is one line and names the remedy."""


class Failed(Exception):
    """The training itself went wrong: exit code 1. What was good of it is kept, and named."""


class TryAgain(Exception):
    """Stopped in good order behind a checkpoint: exit code 75. The same command goes on."""


class Superseded(TryAgain, OSError):
    """Another process has taken over the folder: exit code 75, and nothing more is written there.

    An OSError as well: a save that the lease refuses ends as one that the disk refuses.
    """
