"""What happens before training. Each module is a command: python -m prepare.NAME --help"""

import os
import signal
import sys

# Idle threads spin only briefly, see tests/bench/README.md. It counts only before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def stop(number: int, frame: object) -> None:
    """Ctrl-C is an exception for a command's main(), and the end as long as that is imported."""
    if hasattr(sys.modules["__main__"], "main"):
        signal.default_int_handler(number, frame)
    print("stopped", file=sys.stderr)
    os._exit(130)


if sys.argv[0] == "-m":  # as python has it while it looks for the command
    signal.signal(signal.SIGINT, stop)
