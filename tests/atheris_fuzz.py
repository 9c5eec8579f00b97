"""The targets of test_fuzz.py, with inputs chosen by which code they reach; by hand:

    pip install atheris
    python tests/atheris_fuzz.py manifest -runs=20000      # a target, and options of libFuzzer

An input that does more than fail with one line ends it, is kept in crash-* and said.
"""

import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with atheris.instrument_imports(include=["data", "prepare"]):
    from test_fuzz import finding, make_targets


def main():
    with tempfile.TemporaryDirectory() as folder:
        target = make_targets(Path(folder) / "files")[sys.argv[1]]
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        for i, seed in enumerate(target.seeds):
            (seeds / str(i)).write_bytes(seed)

        def one_input(content):
            if found := finding(target, content):
                raise RuntimeError(found)

        atheris.Setup([sys.argv[0], *sys.argv[2:], str(seeds)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
