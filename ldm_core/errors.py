"""The errors a user is meant to read."""


class UserError(ValueError):
    """A mistake of the user's: the message names the value found and a way to mend it.

    The command line prints it as one line and exits with 2; the server answers 422.
    """


class BadMedia(Exception):
    """One file that cannot be used; it becomes a counted row of the store's `rejects`.

    Attributes:
        stage: where it failed, e.g. "list", "decode", "encode".
        reason: short and countable, e.g. "truncated".
        detail: what the library said about this very file.
    """

    def __init__(self, stage: str, reason: str, detail: str = "") -> None:
        super().__init__(f"{stage}: {reason}: {detail}" if detail else f"{stage}: {reason}")
        self.stage, self.reason, self.detail = stage, reason, detail

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.stage, self.reason, self.detail)
