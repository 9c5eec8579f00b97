"""A run's figures where people look at them: in TensorBoard or wandb, imported only here."""

from collections.abc import Callable
from pathlib import Path


def open_log(kind: str, path: Path, config: dict, step: int) -> Callable[[dict], None]:
    """A function that takes the lines of a run's log, out/PHASE.jsonl, as they are made. kind:
    tensorboard, whose files go into the directory `path`, or wandb, where `path` is the name of the
    run. step: how far the run is already; what was shown beyond it is replaced or left out."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(path), purge_step=step + 1)

        def add(line: dict) -> None:
            for name, value in numbers(line).items():
                writer.add_scalar(name, value, line["step"])
            writer.flush()

        return add
    import wandb

    # One name is one run, so that a resumed run goes on in its own curves.
    name = f"{path.resolve().parent.name}-{path.name}"
    options = {"name": name, "id": name, "resume": "allow" if step else None}
    run = wandb.init(project="speech-llm", dir=str(path.parent), config=config, **options)
    return lambda line: run.log(numbers(line), step=line["step"])


def numbers(line: dict) -> dict[str, float]:
    """The figures of a line of the log, without its step."""
    return {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
