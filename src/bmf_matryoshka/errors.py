"""The one exception for what a user can put right: the command line prints it as a single line."""


class InputError(ValueError):
    """A file, value or order of steps that cannot be used; the message names it and the remedy."""
