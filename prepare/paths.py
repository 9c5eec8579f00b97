"""Files that other files name or come with: where a path leads, and how much of a file is read."""

import os
import stat
from functools import lru_cache


def leads_out(folder, audio):
    """Whether a path, relative to a folder, is of a file outside it: by being absolute, by "..", or by a symbolic link.
    Of SHARD.tar/MEMBER it is the shard that counts. A folder's links are looked up once."""
    folder = os.path.abspath(folder)  # what was looked up stays true when the working directory changes
    shard, tar, _ = os.path.join(folder, audio).partition(".tar/")
    directory, name = os.path.split(shard + tar.rstrip("/"))
    try:
        home, _ = _directory(folder)
        place, links = _directory(directory)
        if name in links or name == "..":
            place = os.path.realpath(os.path.join(directory, name))
    except ValueError:  # a null byte, which no file's name can have
        return False
    return place != home and not place.startswith(home.rstrip("/") + "/")


def outside(count):
    """What to tell who writes a manifest of which so many rows lead out of its folder."""
    return (f"the audio of {count:,} rows is outside the manifest's folder: train with --trust-paths, or write the "
            "manifest into a folder that has the audio in it")


@lru_cache(maxsize=2**16)
def _directory(path):
    # where it really is, and which of its entries are symbolic links
    try:
        with os.scandir(path) as entries:
            links = frozenset(entry.name for entry in entries if entry.is_symlink())
    except OSError:
        links = frozenset()
    return os.path.realpath(path), links


def read_bytes(path, limit):
    """The content of a regular file of at most `limit` bytes. Raises OSError, also for any other."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(f"more than {limit:,} bytes")
        return file.read()


def open_regular(path):
    """A file opened for reading in binary, if it is a regular one: a pipe would block and a device has no end. Raises
    OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):  # open() has a word for a directory
        raise OSError("not a regular file")
    return open(path, "rb")
