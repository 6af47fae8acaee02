"""What a user did wrong, said in one line that tells what to do; the command exits with 2."""


class UserError(Exception):
    """Bad configuration or input. The message is one line and names the remedy."""
