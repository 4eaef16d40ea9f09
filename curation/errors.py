"""The errors a user meets. Each is one line that names what is wrong and what to do, and carries an exit code."""


class LvdError(Exception):
    """Something failed; the message is shown as it is, without a traceback. Exit code 1."""

    exit_code = 1


class ConfigError(LvdError):
    """The command, the recipe or an input is not usable as given. Exit code 2."""

    exit_code = 2


class PartialError(LvdError):
    """Some parts are done and kept, others are not; the same command resumes. Exit code 3."""

    exit_code = 3


class StoppedError(PartialError):
    """Interrupted, and what is done is saved; the run goes on where it is resumed. Exit code 130."""

    exit_code = 130
