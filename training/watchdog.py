"""Signals, silence and errors of several ranks: whatever ends one of them ends all, with its reason."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

import terminal
from training.compiler import is_interrupted
from training.distributed import SINGLE, STOPPED, init_distributed, leave, shut_down


@contextlib.contextmanager
def started(device, timeout, single=False):
    """Meet the other ranks (`single`: there are none) and watch over them: yields a Watchdog.

    An exception on one rank ends all of them at once, and a rank that the others wait for is named.
    """
    # before the signals are caught: waiting for the others, one ends the process at once
    ranks = SINGLE if single else init_distributed(device, timeout)
    watchdog = Watchdog(ranks, timeout, StopSignal())
    with guarded(ranks, watchdog):
        yield watchdog


@contextlib.contextmanager
def guarded(ranks, watchdog):
    """End every rank when one ends, and leave without torch's destructors; a single process is left alone."""
    try:
        yield
    except BaseException as problem:
        if watchdog.stop.is_set() and (is_silence(problem) or is_interrupted(problem)):
            watchdog.leave_amid_step()
        if ranks.world == 1:
            raise
        if isinstance(problem, SystemExit):
            shut_down(ranks, problem.code or 0)
        if not is_silence(problem):
            traceback.print_exc()
        else:
            watchdog.report("the connection to another rank is broken or silent")
        shut_down(ranks, 1)


def is_silence(problem):
    """Whether a collective's exception says that another rank is gone, not that something is wrong here."""
    return isinstance(problem, dist.DistError) or isinstance(problem, RuntimeError) and "gloo" in str(problem)


class StopSignal(threading.Event):
    """Set by the first SIGINT, SIGTERM or SIGHUP; one that comes over two seconds later ends the process.

    Those in between are the same again: from the terminal and from torchrun, which passes it on; or from the
    kernel, which says of each of a dead launcher's threads that the parent has died.
    """

    def __init__(self):
        super().__init__()
        self.first = None  # when the first signal came
        for signum in (signal.SIGINT, *terminal.stop_signals()):
            signal.signal(signum, self.receive)

    def receive(self, signum, _):
        if self.first is None:
            self.first = time.monotonic()
            # only once: it takes a lock, and a second signal interrupts what the handler does for the first
            self.set()
        elif time.monotonic() - self.first > 2:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


class Watchdog:
    """Tells the other ranks that this one lives and how far it is, and ends it when nothing moves.

    After `timeout` seconds without progress it names the ranks that are missing and ends the process. A
    thread writes to the ranks' key-value store, so that it works while the main thread waits in a collective,
    and stops when the process is stopped or dies.
    """

    def __init__(self, ranks, timeout, stop):
        self.ranks, self.timeout, self.stop, self.interval = ranks, timeout, stop, min(5.0, timeout / 4)
        self.step, self.moved, self.beats, self.leaving = 0, time.monotonic(), 0, threading.Event()
        if ranks.world > 1:
            self.pool = ThreadPoolExecutor(2)  # rank 0 may have stopped while it is asked
            store = dist.TCPStore(*ranks.store, is_master=False, timeout=timedelta(seconds=30))
            self.store = dist.PrefixStore("watch", store)
            threading.Thread(target=self.run, daemon=True).start()

    def at_step(self, step):
        """Note that the main thread has come to this step."""
        self.step, self.moved = step, time.monotonic()

    def alive(self, *_):
        """Note that the main thread gets on within its step; arguments are for callers that have some."""
        self.moved = time.monotonic()

    def close(self):
        self.leaving.set()

    def run(self):
        while not self.leaving.wait(self.interval if self.beats else 0):
            self.ask_store(self.beat, max(self.timeout, 2 * self.interval + 5))
            if time.monotonic() - self.moved > self.timeout:
                self.report(f"no progress for {self.timeout:g} s", self.moved)

    def ask_store(self, question, patience):
        """Ask the store a question; ends the process if rank 0, which keeps it, does not answer in time."""
        try:
            return self.pool.submit(question).result(timeout=patience)
        except Exception:
            if not self.leaving.wait(0.1):
                self.end(f"rank 0 at {self.ranks.store[0]} is dead or stopped: its store does not answer")

    def beat(self):
        self.beats += 1
        self.store.set(str(self.ranks.rank), f"{self.beats} {self.step} {socket.gethostname()}")
        return self.store.check([str(self.ranks.rank)])  # waits for an answer, which `set` does not

    def last_beats(self):
        """Each rank's last sign of life: [beats, step, host], or None if there was none."""
        names = map(str, range(self.ranks.world))
        return [self.store.get(name).decode().split(" ", 2) if self.store.check([name]) else None
                for name in names]

    def report(self, why, since=None):
        """Find out who is silent and who is behind, say so, and end the process.

        Unless the main thread has moved on from where it was `since`.
        """
        patience = 2 * self.interval + 5
        before = self.ask_store(self.last_beats, patience)
        for _ in range(6):
            if self.stop.wait(self.interval / 2):
                self.end(why)  # the launcher is ending all ranks: it knows why, and waits for this one
            self.ask_store(self.beat, patience)
        after = self.ask_store(self.last_beats, patience)
        suspects = self.suspects(before, after)
        self.stop.wait(2 * self.interval)  # others are still looking
        if since not in (None, self.moved):
            return  # it was slow, as on a machine that has too much to do
        self.end(f"{why}; {suspects}")

    def suspects(self, before, after):
        """Who is dead or behind, in words, from two rounds of `last_beats`."""
        others = [rank for rank in range(self.ranks.world) if rank != self.ranks.rank]
        silent = [rank for rank in others if after[rank] is None or after[rank] == before[rank]]
        steps = [0 if beat is None else int(beat[1]) for beat in after]
        furthest = max(steps)
        lines = []
        for rank in silent:
            host = f" on {after[rank][2]}" if after[rank] else ""
            last = f"its last sign of life came at step {steps[rank]}"
            lines.append(f"rank {rank}{host} is dead or stopped ({last})")
        for rank in range(self.ranks.world):
            if rank not in silent and steps[rank] < furthest:
                host = after[rank][2]
                place = f"after step {steps[rank]} (the furthest: {furthest})"
                lines.append(f"rank {rank} on {host} hangs {place}")
        if not lines:
            return (f"all ranks answer and stand at step {furthest}: "
                    "a collective hangs, or a step takes longer than timeout")
        return "; ".join(lines[:8])

    def leave_amid_step(self):
        """End the process after a signal that has ended the compiler, too, or another rank.

        The step can't be finished, and what came after the last checkpoint is lost.
        """
        print(f"train.py: stopped by a signal amid step {self.step + 1}, which compiles or waits for another "
              "rank; continue with --resume=auto", file=sys.stderr, flush=True)
        if self.ranks.world > 1:
            leave(STOPPED)
        raise SystemExit(STOPPED) from None

    def end(self, message):
        speaker = f"train.py: rank {self.ranks.rank}"
        print(f"{speaker}: {message}; ended, continue with --resume=auto", file=sys.stderr, flush=True)
        leave(STOPPED if self.stop.is_set() else 1)
