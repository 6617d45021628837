"""What a training shows and writes of its steps: progress, metrics, skipped steps, a trace."""

import math
import resource
import time
from pathlib import Path

import torch

from emu3.train.cards import peak_flops
from emu3.train.flops import step_flops
from emu3.train.loop import progress_bar
from emu3.train.metrics import Metrics, are_on_gpu, numbers_of
from emu3.train.pretrain import Pretraining
from emu3.train.ranks import is_first, leave
from emu3.train.stage import StepMetrics

_NOT_LOGGED = "pairs", "in_a_row"


class Journal:
    """Reads the metrics of the steps, logs some, and reports the skipped ones.

    Every rank reads, since all must leave when the guard's limit is reached; the first one writes.
    """

    def __init__(self, run: Pretraining, folder: Path, done: int) -> None:
        self._run, self._recipe = run, run.recipe
        self._metrics = Metrics(folder, done) if is_first() else None
        self._progress = progress_bar(visible=is_first())
        steps = run.recipe.train.steps
        state = "already finished" if done == steps else ""
        task = {"total": steps, "completed": done, "state": state}
        self._task = self._progress.add_task(run.recipe.train.stage, **task)
        self._progress.start()
        if left_out := run.stream.rows.left_out:
            self.say(f"train: {left_out} documents are longer than a row and no texts: left out")
        self._unread: list[StepMetrics] = []
        self._started = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        self._unread.append(metrics)

    def read(self, step: int, validation: StepMetrics, *, at_once: bool) -> None:
        """Log ``step``, the last one that was added, if it is time to.

        Every read waits for the GPU, which is to have its next steps queued: without ``at_once``
        it is left alone until a step is logged.
        """
        logs = step % self._recipe.train.log_every == 0 or bool(validation)
        if are_on_gpu(self._unread[-1]) and not (logs or at_once):
            return
        *steps, validated = numbers_of([*self._unread, validation])
        seconds = (time.perf_counter() - self._started) / len(steps)
        self._check(step + 1 - len(steps), steps)
        if logs and self._metrics is not None:
            values = {n: v for n, v in (steps[-1] | validated).items() if n not in _NOT_LOGGED}
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._metrics.log(step, finite, **self._measured(steps, seconds))
        state = f"loss {steps[-1]['loss']:.4f}"
        self._progress.update(self._task, advance=len(steps), state=state)
        self._unread, self._started = [], time.perf_counter()

    def flush(self) -> None:
        """Write all to disk: a checkpoint may not be ahead of its metrics."""
        if self._metrics is not None:
            self._metrics.flush()

    def say(self, line: str) -> None:
        if is_first():
            self._progress.console.print(line, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
        if self._metrics is not None:
            self._metrics.close()

    def _check(self, first: int, steps: list[dict[str, float]]) -> None:
        for step, numbers in enumerate(steps, first):
            if not numbers["in_a_row"]:
                continue
            found = f"loss {numbers['loss']:.4g}, gradient norm {numbers['grad_norm']:.4g}"
            self.say(f"train: step {step} was skipped: {found}")
            if numbers["in_a_row"] >= self._recipe.guard.limit:
                leave(f"train: step {step}: {numbers['in_a_row']:.0f} steps in a row were skipped")

    def _measured(self, steps: list[dict[str, float]], seconds: float) -> dict[str, float]:
        """What depends on the machine."""
        device, parallel = self._run.device, self._recipe.parallel
        tokens, pairs = (sum(s[name] for s in steps) / len(steps) for name in ("tokens", "pairs"))
        measured = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        peak = peak_flops(device, parallel.dtype, tf32=self._recipe.train.tf32)
        if peak is not None:
            flops = step_flops(self._recipe.model, tokens, pairs)
            measured["mfu"] = flops / seconds / peak / parallel.num_ranks
        if device.type == "cuda":
            bytes_held = torch.cuda.max_memory_allocated(device)
        else:
            bytes_held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return measured | {"peak_memory_gib": bytes_held / 2**30}


class Trace:
    """A trace of some steps of the first rank by ``torch.profiler``, for Perfetto."""

    def __init__(self, window: tuple[int, int] | None, folder: Path) -> None:
        self._window = window if is_first() else None
        self._folder, self._profiler = folder, None

    def start(self, step: int) -> None:
        """Call before a step."""
        if self._window is not None and step == self._window[0]:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def stop(self, step: int) -> None:
        """Call after a step."""
        if self._profiler is not None and step == self._window[1]:
            self.close()

    def close(self) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            first, last = self._window
            profiler.export_chrome_trace(str(self._folder / f"trace-{first}-{last}.json.gz"))
