"""How a command begins, speaks and is stopped. Commands import this before all else: imports take seconds.

What is only said never ends the work: output that can't be written is dropped, with one warning. Of commands
that are there to be read, a reader that is gone (`| head`) ends them quietly.
"""

import _signal  # what `signal` is made of: here already, when that takes time to import
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
MAIN = os.path.abspath(getattr(sys.modules["__main__"], "__file__", "."))  # the program that runs

# Until `run` Ctrl-C ends a command at once and without a word. (Python's own handler would raise
# KeyboardInterrupt amid the imports. Where the signal is ignored, as in a script's background, it stays so.)
if os.path.dirname(MAIN) == HERE and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import contextlib  # noqa: E402
import io  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402


def run(main):
    """Run a command's `main`, with streams that are `Output`s; Ctrl-C ends it with one line and code 130."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # each may be closed
    sys.stdout, sys.stderr = output(1, sys.stdout), output(2, sys.stderr)
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
        sys.stdout.flush()
    except SystemExit:
        sys.stdout.flush()
        raise
    except (KeyboardInterrupt, Exception) as problem:
        if not (interrupted or isinstance(problem, KeyboardInterrupt)):
            raise
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGINT, before)


interrupted = False  # by SIGINT


def interrupt(*_):
    """SIGINT's handler: raises KeyboardInterrupt, of which an import may make something else."""
    global interrupted
    interrupted = True
    raise KeyboardInterrupt


def stop_signals():
    """The signals that ask a process to stop: SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, hangup]


# ---------------------------------------------------------------------------------------------------- streams


class Output(io.FileIO):
    """Standard output or error: what can't be written ends the process or, if it is `optional`, is dropped.

    The process ends quietly, with 141, if a reader is gone, as a shell says it of those whom SIGPIPE ends;
    else with one line and 1.
    """

    def __init__(self, descriptor, optional):
        super().__init__(descriptor, "wb", closefd=False)
        self.optional, self.failed = optional, False

    def write(self, data):
        left = memoryview(data)
        try:
            while left:
                written = super().write(left)
                if written is None:  # a pipe of those that don't block is full
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as problem:
            if not self.failed:  # said once; and Python tries again at its end
                self.failed = True
                self.report(problem)
        return len(data)

    def report(self, problem):
        """Say, where that can be read, that this stream can't be written; ends the process if it matters."""
        if self.optional and self.fileno() == 1:
            write_error(f"warning: standard output can't be written ({problem.strerror}); the work goes on")
        if self.optional:
            return
        if isinstance(problem, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE)
        command = os.path.basename(sys.argv[0])
        write_error(f"{command}: standard output can't be written: {problem.strerror}")
        raise SystemExit(1)


def write_error(line):
    """Write a line to standard error itself: sys.stderr may be a progress bar's, on the very terminal."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def output(descriptor, stream):
    """The stream over an `Output`, with escapes for what its encoding lacks; the null device if it is closed.

    Standard error is optional.
    """
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    raw = Output(descriptor, optional=descriptor == 2)
    buffer = raw if stream.write_through else io.BufferedWriter(raw)  # as Python does with -u
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace",
                            line_buffering=stream.line_buffering, write_through=stream.write_through)


def keep_going():
    """Let output that can't be written end nothing from here on: this command's results are on the disk."""
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if isinstance(raw, Output):
        raw.optional = True


@contextlib.contextmanager
def optional(what):
    """Let the block fail with a warning that says `what` went wrong: nothing depends on it."""
    try:
        yield
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0]
        print(f"warning: {what} ({type(problem).__name__}: {reason})", file=sys.stderr, flush=True)
