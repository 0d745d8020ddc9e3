"""The one exception type that tinyllama raises for what a user can cause."""


class TinyllamaError(Exception):
    """One line that names the file or setting and what is wrong with it."""


class Cancelled(TinyllamaError):
    """Somebody set the cancel flag while a prompt or a token was being computed."""
