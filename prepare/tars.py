"""Tars as an index of their files. Nothing is extracted, and no link, device or directory in them is followed or made.

Formats: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax), and GNU tar's long names and large sizes.
"""

import re

BLOCK, LONGEST_NAME, LARGEST = 512, 2**20, 2**50  # bytes
DATA, NO_DATA = b"0\x007", b"123456"  # types of entries: files; links, devices, directories


def tar_members(file):
    """(name, offset, size) of every file in a tar that is open for reading in binary, or is unpacked by gzip; it then
    stands at the offset. Raises ValueError if it is not a tar, is cut or has sparse files."""
    at, name, size = 0, None, None  # the last two: what an entry says of the one behind it
    while head := file.read(BLOCK):
        if len(head) < BLOCK:
            raise ValueError("not a whole tar")
        if not any(head):
            return
        if _number(head[148:156]) != sum(head[:148]) + 8 * 32 + sum(head[156:]):
            raise ValueError("not a tar or a damaged one")
        kind, length = head[156:157], 0 if head[156:157] in NO_DATA else _number(head[124:136])
        at += BLOCK
        if kind in b"LKxg":
            if length > LONGEST_NAME:
                raise ValueError(f"a tar with a name of {length:,} bytes")
            text = file.read(length)
            if kind == b"L":
                name = text.rstrip(b"\0")
            elif kind == b"x":
                name, size = _pax(text, name)
        else:
            length = size if size is not None and kind not in NO_DATA else length
            if kind == b"S":
                raise ValueError("a tar with sparse files")
            if length > LARGEST:
                raise ValueError(f"a tar with {length:,} bytes in a file")
            if name is None:
                prefix = head[345:500].partition(b"\0")[0] if head[257:263] == b"ustar\0" else b""
                name = prefix + b"/" * bool(prefix) + head[:100].partition(b"\0")[0]
            if kind in DATA and not name.endswith(b"/"):
                yield name.decode(errors="surrogateescape").removeprefix("./"), at, length
            name = size = None
        at += length
        if length:
            file.seek(at - 1)
            if not file.read(1):
                raise ValueError("a tar that is cut off")
        at += -length % BLOCK
        file.seek(at)


def _number(text):
    # octal digits or, behind a byte of 128, a big-endian number
    if text[:1] == b"\x80":
        return int.from_bytes(text[1:], "big")
    if not re.fullmatch(rb"[ \0]*([0-7]*)[ \0]*", text):
        raise ValueError("not a tar or a damaged one")
    return int(text.strip(b" \0") or b"0", 8)


def _pax(text, name):
    # the path and the size that records "LENGTH KEY=VALUE\n" give, the size None if they give none
    size = None
    while text:
        length, _, _ = text[:20].partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(text):
            raise ValueError("a damaged tar")
        key, _, value = text[len(length) + 1:int(length)].removesuffix(b"\n").partition(b"=")
        text = text[int(length):]
        if key == b"path":
            name = value
        elif key == b"size":
            size = _number(value[:20])
        elif key.startswith(b"GNU.sparse"):
            raise ValueError("a tar with sparse files")
    return name, size
