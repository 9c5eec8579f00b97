"""What the repository promises about itself, computed from the code: sizes, imports and their
direction, names, style. tests/test_whole.py runs the five files alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIVE = ("model", "data", "sample", "eval", "train")  # each imports only those before it
RUNTIME = {"torch", "safetensors", "tokenizers", "numpy", "soundfile", "tqdm", "huggingface_hub"}
OPTIONAL = {"pyarrow", "wandb"}  # imported inside the one function that needs it
COMPILER = {"triton"}  # comes with PyTorch for CUDA; extras/cuda.py alone imports it
SCORERS = {"sacrebleu", "jiwer", "whisper_normalizer"}
NEVER = {"found", "some", "own", "kept", "told", "heard", "said", "whole"}  # as last words of names
LINES = 5000  # of the five files together
README = (170, 1700)  # lines, words
# But by tests, and by the code of exported models.
NEVER_IMPORTED = {"transformers", "torchaudio", "librosa", "datasets"}


def sources(*folders):
    """The Python files of the repository's top level and of these folders, by their names."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    paths += [ROOT / f"{name}.py" for name in FIVE]
    return {str(path.relative_to(ROOT)): path for path in paths}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def ruff(*argv, text=None):
    """What ruff says, and how it exits."""
    command = [sys.executable, "-m", "ruff", *argv]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)
    return done.stdout + done.stderr, done.returncode


# ------------------------------------------------------------------------------
# Size


def test_the_five_files_stay_short():
    """As ruff format leaves them: packing does not help, and no line is left out of it."""
    options = ("--isolated", "--line-length", "100", "-")
    total = 0
    for name in FIVE:
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"#\s*fmt:|#\s*yapf:", text), name
        formatted, code = ruff("format", *options, text=text)
        assert code == 0, formatted
        total += len(formatted.splitlines())
    assert total < LINES


def test_functions_are_short():
    """The files themselves are formatted, see test_style."""
    long = []
    for name, path in sources("extras", "prepare", "demo", "tests").items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if size >= 60:
                    long.append(f"{name}: {node.name} has {size} lines")
    assert not long


# ------------------------------------------------------------------------------
# Style


def test_style():
    for argv in (["format", "--check", "."], ["check", "."]):
        output, code = ruff(*argv)
        assert code == 0, output[:2000]


def test_functions_are_simple():
    """No comment lets one off."""
    rule = ["--select", "C901", "--config", "lint.mccabe.max-complexity=12", "--ignore-noqa"]
    output, code = ruff("check", "--isolated", *rule, ".")
    assert code == 0, output


def last_word(name):
    """The last word of a name in any of Python's spellings, in lower case."""
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)
    return words[-1].lower() if words else ""


def names(tree):
    """(line, name) of every function, class, argument and variable that a module makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def test_names_are_nouns_and_verbs():
    assert list(map(last_word, ("KVCache", "is_kept", "MAX_OWN"))) == ["cache", "kept", "own"]
    poor = []
    for file, path in sources("extras", "prepare").items():
        poor += [
            f"{file}:{n}: {name}" for n, name in names(parsed(path)) if last_word(name) in NEVER
        ]
    assert not poor


# ------------------------------------------------------------------------------
# Imports


def imported(node):
    """The modules of an import statement."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return []


def packages(nodes):
    """The packages that syntax nodes import, without those of Python."""
    modules = [module for node in nodes for module in imported(node)]
    return {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)


def at_import(tree):
    """The nodes that are run when a module is imported: those outside functions."""
    pending = list(ast.iter_child_nodes(tree))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize("name", FIVE)
def test_the_five_import_from_left_to_right(name):
    """And the optional folder extras/ only inside functions, prepare/ and demo/ never."""
    tree = parsed(ROOT / f"{name}.py")
    allowed = RUNTIME | set(FIVE[: FIVE.index(name)]) | (SCORERS if name == "eval" else set())
    assert packages(at_import(tree)) <= allowed - {"huggingface_hub"}
    assert packages(ast.walk(tree)) <= allowed | {"extras"}


@pytest.mark.parametrize(
    "folder, ours", [("extras", {"model", "data"}), ("prepare", set(FIVE)), ("demo", set(FIVE))]
)
def test_what_stands_aside_imports_the_five(folder, ours):
    """And nothing that stands aside elsewhere. Only what made demo/ may need more packages."""
    others = {"extras", "prepare", "demo", "tests"} | set(FIVE)
    for path in sorted((ROOT / folder).rglob("*.py")):
        needs = packages(ast.walk(parsed(path)))
        assert not packages(at_import(parsed(path))) & OPTIONAL, path
        assert needs & others <= ours | {folder}, path
        if path.parent.name == "exported":  # runs elsewhere, where nothing of ours is
            assert needs <= {"torch", "transformers"}, path
            continue
        assert not needs & NEVER_IMPORTED, path
        if path.relative_to(ROOT) == Path("extras", "cuda.py"):
            needs -= COMPILER
        assert folder == "demo" or needs <= RUNTIME | OPTIONAL | ours | {folder}, path


def test_every_extra_is_compared_with_its_plain_twin():
    trees = [parsed(ROOT / "tests" / f"test_{name}.py") for name in ("extras", "cuda_kernels")]
    tested = {module for tree in trees for node in ast.walk(tree) for module in imported(node)}
    extras = {f"extras.{path.stem}" for path in (ROOT / "extras").glob("*.py")}
    assert len(extras) > 1 and extras - {"extras.__init__"} <= tested


def requirements(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    return {name.replace("-", "_") for name in re.findall(r"^[\w-]+", text, re.MULTILINE)}


def test_requirements_are_the_promised_packages():
    # The Hub's client comes with tokenizers.
    assert requirements("requirements.txt") == (RUNTIME | SCORERS) - {"huggingface_hub"}
    assert {"pytest", "ruff"} <= requirements("tests/requirements.txt")


# ------------------------------------------------------------------------------
# Words


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines, words = README
    assert len(text.splitlines()) <= lines and len(text.split()) <= words
