"""Promises the repository makes about itself: size, imports, import direction."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP = [p for p in (ROOT / name for name in ("model.py", "data.py", "sample.py", "eval.py", "train.py")) if p.exists()]
RUNTIME = {"torch", "safetensors", "tokenizers", "numpy", "soundfile", "tqdm", "huggingface_hub"}
FORMATS = ("audio", "checkpoint", "draw", "errors", "instructions", "mcif", "paths", "tars")  # what the five files use of prepare/
SCORERS = {"sacrebleu", "jiwer", "whisper_normalizer"}


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_the_top_level_files_stay_short():
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in TOP) < 2400


def test_only_the_promised_packages_and_one_direction():
    ours = [p.stem for p in TOP]
    for i, path in enumerate(TOP):
        allowed = RUNTIME | set(ours[:i]) | {"prepare"} | (SCORERS if path.name == "eval.py" else set())
        assert imports(path) <= allowed, path.name
    for name in FORMATS:
        assert imports(ROOT / "prepare" / f"{name}.py") <= RUNTIME | {"prepare"}, name


def test_requirements_are_those_packages():
    names = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert {name.replace("-", "_") for name in names} <= RUNTIME | SCORERS
