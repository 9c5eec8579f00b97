"""What can be wrong with a user's files. Every message is one line: the file, what was found and expected, the remedy."""


class AudioError(ValueError):
    """Audio that cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names the line, too."""


class RankError(RuntimeError):
    """Several processes that cannot work together, or no longer."""
