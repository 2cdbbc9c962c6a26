"""Signals, silence and errors of several ranks: whatever ends one ends all, with its reason, and names who is missing."""

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

from training.distributed import shut_down


def stop_on_signals():
    """An event that the first SIGTERM or SIGINT sets. One that comes more than two seconds later ends the process.

    Those in between are the same again: from the terminal and from torchrun, which passes it on; or from the kernel, which
    says of each of a dead launcher's threads that the parent has died.
    """
    stop, first = threading.Event(), None

    def request(signum, _):
        nonlocal first
        if first is None:
            first = time.monotonic()
            stop.set()  # only once: it takes a lock, and a second signal interrupts what the handler does for the first
        elif time.monotonic() - first > 2:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, request)
    return stop


class Watchdog:
    """Tells the other ranks that this one lives and how far it is; when nothing moves for `timeout` seconds it names who is
    missing and ends the process.

    A thread writes to the ranks' key-value store, so that it works while the main thread waits in a collective, and
    stops when the process is stopped or dies.
    """

    def __init__(self, ranks, timeout, stop):
        self.ranks, self.timeout, self.stop, self.every = ranks, timeout, stop, min(5.0, timeout / 4)
        self.step, self.moved, self.beats, self.leaving = 0, time.monotonic(), 0, threading.Event()
        if ranks.world > 1:
            self.asking = ThreadPoolExecutor(2)  # rank 0 may have stopped while it is asked
            self.store = dist.PrefixStore("watch", dist.TCPStore(*ranks.store, is_master=False, timeout=timedelta(seconds=30)))
            threading.Thread(target=self.run, daemon=True).start()

    def at(self, step):
        """The main thread has come this far."""
        self.step, self.moved = step, time.monotonic()

    def close(self):
        self.leaving.set()

    def ask(self, work, patience):
        """work(), which asks the store; ends the process if rank 0, which keeps it, does not answer for so many seconds."""
        try:
            return self.asking.submit(work).result(timeout=patience)
        except Exception:
            if not self.leaving.wait(0.1):
                self.end(f"rank 0 at {self.ranks.store[0]} is dead or stopped: its store does not answer")

    def beat(self):
        self.beats += 1
        self.store.set(str(self.ranks.rank), f"{self.beats} {self.step} {socket.gethostname()}")
        return self.store.check([str(self.ranks.rank)])  # waits for an answer, which `set` does not

    def run(self):
        while not self.leaving.wait(self.every if self.beats else 0):
            self.ask(self.beat, max(self.timeout, 2 * self.every + 5))
            if time.monotonic() - self.moved > self.timeout:
                self.report(f"no progress for {self.timeout:g} s", self.moved)

    def heard(self):
        """What each rank last said: [beats, step, host], or None if nothing."""
        names = map(str, range(self.ranks.world))
        return [self.store.get(name).decode().split(" ", 2) if self.store.check([name]) else None for name in names]

    def report(self, why, since=None):
        """Find out who is silent and who is behind, say so, and end the process; unless it has moved on from where it was `since`."""
        patience = 2 * self.every + 5
        before = self.ask(self.heard, patience)
        for _ in range(6):
            if self.stop.wait(self.every / 2):  # the launcher is ending all ranks: it knows why, and waits for this one
                self.end(why)
            self.ask(self.beat, patience)
        after = self.ask(self.heard, patience)
        silent = [rank for rank in range(self.ranks.world) if rank != self.ranks.rank and (after[rank] is None or after[rank] == before[rank])]
        steps = [0 if said is None else int(said[1]) for said in after]
        behind = [rank for rank in range(self.ranks.world) if rank not in silent and steps[rank] < max(steps)]
        named = [f"rank {rank}{f' on {after[rank][2]}' if after[rank] else ''} is dead or stopped (its last sign of life came at step {steps[rank]})" for rank in silent]
        named += [f"rank {rank} on {after[rank][2]} hangs after step {steps[rank]} (the furthest: {max(steps)})" for rank in behind]
        self.stop.wait(2 * self.every)  # others are still looking
        if since not in (None, self.moved):
            return  # it was slow, as on a machine that has too much to do
        self.end(f"{why}; " + ("; ".join(named[:8]) or f"all ranks answer and stand at step {max(steps)}: a collective hangs, or a step takes longer than timeout"))

    def end(self, message):
        print(f"train.py: rank {self.ranks.rank}: {message}; ended, continue with --resume=auto", file=sys.stderr, flush=True)
        shut_down(self.ranks, code=1)


def is_silence(problem):
    """Whether an exception of a collective says that another rank is gone or late, rather than that something is wrong here."""
    return isinstance(problem, dist.DistError) or isinstance(problem, RuntimeError) and "gloo" in str(problem)


@contextlib.contextmanager
def guarded(ranks, watch):
    """Whatever ends one rank of several ends it at once and with a reason; a rank that others wait for is named."""
    try:
        yield
    except BaseException as problem:
        if ranks.world == 1:
            raise
        if isinstance(problem, SystemExit):
            shut_down(ranks, problem.code or 0)
        if not is_silence(problem):
            traceback.print_exc()
        else:
            watch.report("the connection to another rank is broken or silent")
        shut_down(ranks, 1)
