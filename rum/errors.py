"""What can go wrong through no fault of the library; pipelines print these without a traceback."""


class RumError(Exception):
    """Base of the errors that a user can mend; the message says what must hold and what came."""


class ConfigError(RumError, ValueError):
    """An option, a search space or a combination of them is not valid."""


class DataError(RumError):
    """A corpus is missing, truncated or altered."""


class CheckpointError(RumError):
    """A checkpoint is unreadable, damaged, of another format or of another model."""


class SupersededError(RumError):
    """Another process has taken over what this one was doing."""


class DivergedError(RumError):
    """Training met a loss or gradient that is not finite."""


class StudyError(RumError):
    """A study is missing, locked by another driver or was made with another space."""


class TrackingError(RumError):
    """The MLflow tracking server or its store cannot be used."""
