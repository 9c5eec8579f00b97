"""What can be wrong with a user's files or run. Every message is one line: the file, what was found and expected, the
remedy. Names and texts in them may come from anywhere, so visible() shows what a terminal would obey instead of print.
"""

import re

# C0 and C1 control characters, marks and overrides of the writing direction, line separators, lone surrogates
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text, keep=""):
    """A text of unknown origin as it may be printed: control characters, but for those in `keep`, and characters that
    turn the writing direction appear as \\u001b and so on, which leaves JSON as it was meant."""
    return HIDDEN.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", str(text))


class UserError(ValueError):
    """A file or a command that cannot be used; the message is one line that is safe to print."""

    def __str__(self):
        text = visible(super().__str__())
        return text if len(text) <= 2000 else text[:2000] + "..."


class AudioError(UserError):
    """Audio that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


class ManifestError(UserError):
    """A manifest that cannot be used; the message names the line, too."""


class TrainError(UserError):
    """A run that cannot go on; the message says why and what to do."""
