"""What a training run meets: signals, loader processes that die or hang, steps without a finite gradient."""

import json
import math
import multiprocessing
import os
import signal
from contextlib import contextmanager

from prepare.checkpoint import read_lines, write_text
from prepare.errors import ManifestError, TrainError
from prepare.ranks import rank

LOADER_SECONDS = 600  # so long a loader may take for one batch
NONFINITE_STEPS = 5  # so many in a row end a run
REMEDY = "the last checkpoint is untouched: lower the learning rate or leave such rows out"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """How a run answers SIGINT and SIGTERM: `with Stop() as stop`. A signal raises KeyboardInterrupt; while `waits` is
    true it is only noted, in `asked`, for the step to be finished and saved. After the first signal, a second one ends
    the process there and then. When the run is left, its loader's processes end with it."""

    def __init__(self):
        self.asked, self.waits = None, False

    def __enter__(self):
        self.before = [signal.signal(number, self.note) for number in SIGNALS]
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in multiprocessing.active_children():  # the loader's, which may hang and know no signal but this
            process.kill()
        for number, handler in zip(SIGNALS, self.before):
            signal.signal(number, handler)

    def note(self, number, frame):
        self.asked = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.waits:
            raise KeyboardInterrupt
        # print must not be entered twice
        os.write(2, b"\ntrain.py: stopping after this step; a second signal stops at once\n")

    @contextmanager
    def at_once(self):
        """Within it a signal does not wait: it is noted and leaves the block."""
        self.waits = False
        try:
            yield
        except KeyboardInterrupt:
            if self.asked is None:
                raise
        finally:
            self.waits = True


def ignore_signals(_):
    """For loader processes: a terminal or a batch system signals them too, but the run decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def next_batch(loader):
    """The next batch of a DataLoader's iterator. Raises TrainError if one of its processes died, or none has delivered
    for LOADER_SECONDS."""
    def hung(*_):
        raise TimeoutError

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises wherever the run is; next() looks, too
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(LOADER_SECONDS)
    try:
        return next(loader)
    except TimeoutError as error:
        raise TrainError(f"the loader has delivered nothing for {LOADER_SECONDS} s, is the disk or network of the "
                         "audio gone? What was saved is intact: mend this and start again with --resume") from error
    except (RuntimeError, OSError, ManifestError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of an error in a process, behind its traceback
        raise TrainError(f"a loader process died ({reason}); start again with --resume") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def leave_out(path, step, rows, in_a_row, **why):
    """Writes down the rows of a step that has no finite loss or gradient, behind those of earlier steps, as JSON Lines.
    Returns what to tell; raises TrainError when NONFINITE_STEPS in a row were like that."""
    if rank() == 0:
        lines = [line for line in read_lines(path) if line["step"] < step]  # later ones are those of a run cut off
        lines += [{"step": step, **why, **row} for row in rows]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if in_a_row >= NONFINITE_STEPS:
        raise TrainError(f"step {step}: {why['skipped']}, as in {in_a_row} steps in a row, whose rows are in {path}; "
                         f"{REMEDY}")
    return f"step {step}: {why['skipped']}: left out, its rows are in {path}"


def expect_finite(step, dev_loss):
    if not math.isfinite(dev_loss):
        raise TrainError(f"step {step}: dev_loss {dev_loss}; {REMEDY}")
