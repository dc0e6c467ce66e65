"""What goes wrong, in kinds a caller can tell apart.

Every message is one line that says what is wrong, where, and what to do about it; the command line prints it as it
is and exits with status 1.
"""


class PointAlignError(Exception):
    """An expected failure: bad input, a missing file, a setting that cannot be. Its text is meant for people."""


class ConfigError(PointAlignError, ValueError):
    """A setting, recipe or command-line option is unknown or out of range."""


class DataError(PointAlignError, ValueError):
    """A point cloud, conversation file or data set is missing, broken or of the wrong shape."""


class CheckpointError(PointAlignError):
    """Saved weights are missing, truncated or do not fit the model they are loaded into."""


class MissingDependencyError(PointAlignError, ImportError):
    """An optional package is needed; the text names the `pip install` that brings it."""


class JudgeError(PointAlignError):
    """A judge cannot be reached or does not reply; the replies it gave before are kept."""
