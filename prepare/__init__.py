"""What happens before training. Each module is a command: python -m prepare.NAME --help"""

import os

# Idle threads sleep, see tests/bench/README.md. It counts only before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
