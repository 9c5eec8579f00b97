"""What happens before training. Each module is a command: python -m prepare.NAME --help"""

import os

# Idle threads spin only briefly, see tests/bench/README.md. It counts only before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
