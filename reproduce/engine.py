"""Where tasks run: a pool of processes of one thread each, one per core, or a few per GPU.

Two threads of one process beside another busy process slow each other down by an order of magnitude, so parallelism
comes from running several tasks at once, and a worker has more than one thread only where it is asked for.
"""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from tqdm import tqdm

from reproduce import data
from reproduce.cells import Cell, Task
from reproduce.runner import BENCHES, Runner
from reproduce.store import Store

# Images per second one CPU core takes forwards through WRN-16-1; only for the first estimate of time left.
FORWARD_RATE = 2300.0
# Seconds beside a run's work: loading, the final evaluation, its files; likewise.
OVERHEAD = 0.6


@dataclass
class Outcome:
    """Names of the tasks by what became of them; `failed` maps to the last line of the error."""

    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Workers:
    """How many processes of how many threads, on which devices, with data from where."""

    store: Path
    root: Path
    jobs: int
    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1


def cost(task: Task) -> float:
    """Work of a task in forward passes of one image; used for ordering and for time estimates only."""
    return BENCHES[data.modality(task.victim.dataset)].cost(task)


def expected(tasks: list[Task], store: Store) -> dict[str, float]:
    """Seconds that each task takes, about, by name: its work at the pace of the store's finished runs of its kind
    (victims of one attack, cells of one defense), else of the nearest kind that has any, else of a typical CPU core."""
    spent: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for task in tasks:
        if run := store.find(task.name):
            found = run.json("metrics")
            for kind in _kinds(task):
                spent[kind][0] += found["seconds"] + found["info"].get("judging_seconds", 0.0)
                spent[kind][1] += cost(task)
    paces = {kind: seconds / work for kind, (seconds, work) in spent.items()}
    return {task.name: OVERHEAD + cost(task) * next((paces[kind] for kind in _kinds(task) if kind in paces),
                                                    1 / FORWARD_RATE) for task in tasks}


def _kinds(task: Task) -> list[tuple[str, ...]]:
    """What a task can be timed with, the nearest first."""
    own = ("cell", task.defense) if isinstance(task, Cell) else (
        "victim" if task.victim.poisoned else "unpoisoned", task.victim.attack)
    path = (data.modality(task.victim.dataset), *own)
    return [path[:depth] for depth in (3, 2, 1, 0)]


def unfinished(tasks: list[Task], store: Store) -> dict[str, Task]:
    """By name, in the order given: the tasks without a finished run, and those whose run such a task needs but which
    lacks what it would load, as exported runs may; `tasks` must be in dependency order."""
    missing: set[str] = set()
    wanted: set[str] = set()
    for task in reversed(tasks):
        if store.find(task.name, task.offers if task.name in wanted else None) is None:
            missing.add(task.name)
            wanted.update(needed.name for needed in task.needs())
    return {task.name: task for task in tasks if task.name in missing}


def execute(tasks: list[Task], workers: Workers, say: Callable[[str], None]) -> Outcome:
    """Run every task that is not finished, each after what it needs; `tasks` must be in dependency order.

    A task that fails is recorded and the others go on; those that need it fail with it.
    """
    store, outcome = Store(workers.store), Outcome()
    waiting = unfinished(tasks, store)
    needed = {need.name for task in waiting.values() for need in task.needs()}
    outcome.reused.extend(task.name for task in tasks if task.name not in waiting)
    if not waiting:
        return outcome
    # Stripped, damaged or gone, while runs made from them are there.
    renewed = {need.name for task in tasks if task.name not in waiting for need in task.needs()} & set(waiting)
    # Of finished ones too: what is made from a victim that comes out otherwise is computed again.
    seconds, ahead = expected(tasks, store), chains(tasks)
    with _Bar({name: seconds[name] / workers.jobs for name in waiting}) as bar, _Pool(workers) as pool:
        running: dict[Future, str] = {}
        deaths: set[str] = set()
        while waiting or running:
            if outcome.failed:
                _drop_orphans(waiting, outcome, say)
            # Looking for what is ready takes a driver of hundreds of tasks a tenth of a core: only where there is room.
            for name in ready(waiting, running, deaths, ahead) if len(running) < workers.jobs else ():
                # After a crash its suspects run one at a time, so that the next one names the culprit.
                alone = bool(running) and not deaths.isdisjoint((name, *running.values()))
                if len(running) >= workers.jobs or alone:
                    break
                task = waiting[name]
                running[pool.submit(task, task.offers if name in needed else None)] = name
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.drain(pool.messages)
            for future in finished:
                name = running.pop(future)
                error = None
                try:
                    line = future.result()
                except BrokenProcessPool:
                    # Every task in flight is lost with the pool, the innocent too: each gets a second try, alone.
                    pool.restart_after(future)
                    if name not in deaths:
                        deaths.add(name)
                        continue
                    error = "its process died twice (out of memory?)"
                    store.fail(name, error)
                except Exception as caught:
                    error = " ".join([f"{type(caught).__name__}:", *str(caught).splitlines()[:1]])
                del waiting[name]
                bar.finish(name)
                if error:
                    outcome.failed[name] = error
                    say(f"FAILED {name}: {error}")
                else:
                    outcome.done.append(name)
                    say(f"done   {name}: {line}")
                    if name in renewed:
                        again = _outdated(tasks, store, outcome)
                        waiting |= again
                        needed |= {need.name for task in again.values() for need in task.needs()}
                        bar.more({other: seconds[other] / workers.jobs for other in again})
    return outcome


def _outdated(tasks: list[Task], store: Store, outcome: Outcome) -> dict[str, Task]:
    """Tasks that counted as done until a run they were made from came out otherwise; they no longer count."""
    again = {name: task for name, task in unfinished(tasks, store).items() if name in outcome.reused}
    outcome.reused = [name for name in outcome.reused if name not in again]
    return again


def chains(tasks: Sequence[Task]) -> dict[str, float]:
    """By name: the work of a task and of the longest chain of tasks that wait for it; `tasks` in dependency order."""
    found = dict.fromkeys((task.name for task in tasks), 0.0)
    for task in reversed(tasks):
        found[task.name] += cost(task)
        for needed in task.needs():
            if needed.name in found:
                found[needed.name] = max(found[needed.name], found[task.name])
    return found


def ready(waiting: dict[str, Task], running: dict[Future, str], deaths: set[str],
          ahead: dict[str, float]) -> list[str]:
    """Tasks whose needs are met: those whose process has died once, then those with the longest chain `ahead` first."""
    busy = set(running.values())
    free = [name for name, task in waiting.items()
            if name not in busy and not any(needed.name in waiting for needed in task.needs())]
    return sorted(free, key=lambda name: (name not in deaths, -ahead[name]))


def _drop_orphans(waiting: dict[str, Task], outcome: Outcome, say: Callable[[str], None]) -> None:
    """Fail the tasks that need a failed one."""
    for name in list(waiting):
        for needed in waiting[name].needs():
            if needed.name in outcome.failed:
                outcome.failed[name] = f"needs {needed.name}, which failed"
                say(f"FAILED {name}: {outcome.failed[name]}")
                del waiting[name]
                break


class _Pool:
    """A process pool that can be started anew after one of its processes died."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.context = start_method(workers.devices)

    def __enter__(self) -> "_Pool":
        self._start()
        return self

    def _start(self) -> None:
        self.submitted: set[Future] = set()
        self.messages = self.context.Queue()
        devices = self.context.Queue()
        for i in range(self.workers.jobs):
            devices.put(self.workers.devices[i % len(self.workers.devices)])
        with threaded(self.workers.threads):
            self.executor = ProcessPoolExecutor(self.workers.jobs, self.context, _start_worker,
                                                (self.workers, devices, self.messages))

    def submit(self, task: Task, holding: str | None) -> Future:
        try:
            with threaded(self.workers.threads):
                future = self.executor.submit(_run, task, holding)
        except BrokenProcessPool:       # since the last look at it
            self._restart()
            return self.submit(task, holding)
        self.submitted.add(future)
        return future

    def restart_after(self, broken: Future) -> None:
        """Start anew, once for all the futures that broke together."""
        if broken in self.submitted:
            self._restart()

    def _restart(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)
        self._start()

    def __exit__(self, kind: type | None, *_rest: object) -> None:
        if kind is not None:
            for process in list((self.executor._processes or {}).values()):
                process.terminate()
        self.executor.shutdown(wait=kind is None, cancel_futures=True)


def start_method(devices: Sequence[str] = ("cpu",)) -> BaseContext:
    """How processes for these devices start. On a CPU they fork from one that has imported what takes seconds and done
    nothing else; CUDA wants new ones."""
    if set(devices) != {"cpu"} or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "reproduce.runner"])      # every optimizer imports the first
    return context


@contextlib.contextmanager
def threaded(threads: int = 1) -> Iterator[None]:
    """Children inherit the settings for so many threads, and an allocator that keeps freed memory (glibc; a tenth
    faster).

    Both are read when a process starts or first imports a math library, so setting them later would be too late.
    """
    settings = {**dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
                "MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_runner: Runner | None = None


def _start_worker(workers: Workers, devices: multiprocessing.Queue, messages: multiprocessing.Queue) -> None:
    global _runner
    belong(workers.threads)
    os.environ["BACKDOOR_DATA"] = str(workers.root)  # where a defense looks for a language model
    device = torch.device(devices.get())
    _runner = Runner(Store(workers.store), workers.root, device,
                     progress=lambda name, share, doing: messages.put((name, share, doing)),
                     note=lambda text: print(text, file=sys.stderr, flush=True))


def belong(threads: int = 1) -> None:
    """Make this process a worker: so many threads, Ctrl-C left to the driver, and no life after the driver's end,
    however it went: a killed run must not go on unseen."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    driver = multiprocessing.parent_process()
    assert driver

    def watch() -> None:
        connection.wait([driver.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(task: Task, holding: str | None) -> str:
    """Compute one task in a worker; its one-line summary."""
    assert _runner is not None
    run = _runner.run(task, holding)
    found = run.json("metrics")
    measures = [f"{name.upper()} {found[name]:.2f}" for name in ("acc", "asr", "ra") if found[name] is not None]
    return f"{', '.join(measures)} ({found['seconds']:.0f} s)"


class _Bar:
    """Progress over all tasks in estimated seconds, with the time left and what is running; silent under CI."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.shares: dict[str, tuple[float, str]] = {}
        quiet = bool(os.environ.get("CI")) or not sys.stderr.isatty()
        self.bar = tqdm(total=round(sum(self.seconds.values()), 1), disable=quiet, unit="s", dynamic_ncols=True,
                        bar_format="{percentage:3.0f}%|{bar:20}| {elapsed} gone, {remaining} left {postfix}")

    def __enter__(self) -> "_Bar":
        return self

    def drain(self, messages: multiprocessing.Queue) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                name, share, doing = messages.get_nowait()
                self._move(name, share, doing)

    def more(self, seconds: dict[str, float]) -> None:
        """Tasks that turned out to be needed besides."""
        self.seconds |= seconds
        self.bar.total += sum(seconds.values())

    def finish(self, name: str) -> None:
        self._move(name, 1.0, "")
        self.shares.pop(name, None)

    def _move(self, name: str, share: float, doing: str) -> None:
        before = self.shares.get(name, (0.0, ""))[0]
        self.shares[name] = max(share, before), doing
        self.bar.update(max(0.0, share - before) * self.seconds.get(name, 0.0))
        self.bar.set_postfix_str("; ".join(f"{n} {d}" for n, (_s, d) in self.shares.items() if d)[:120])

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def default_devices(choice: str) -> tuple[str, ...]:
    """Devices for "auto", "cpu" or "cuda"."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return ("cpu",)
    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))


def check_data(tasks: list[Task], root: Path) -> None:
    """Load each data set and each encoder once before any worker starts, so that a missing file is one line and not
    many failures."""
    victims = [task.victim for task in tasks]
    for modality, bench in BENCHES.items():
        bench.check([victim for victim in victims if data.modality(victim.dataset) == modality], root)
