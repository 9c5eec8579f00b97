"""Memory of a process that allocates the same tensors again and again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed():
    """Freed memory stays with the process, for its next step: the C library would return tensors of 32 MB and more to the
    system at once, which hands them out again page by page, filled with zeros (a fifth of a training step on CPU). The
    peak stays as it is. Where the C library is not glibc, nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
