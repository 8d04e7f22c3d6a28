"""Signals that ask a process to stop: SIGINT (Ctrl-C), SIGTERM (launchers, schedulers, Kubernetes), SIGUSR1 (SLURM) and SIGHUP (a
terminal or an SSH connection that closes).

Where nothing can be lost, a signal ends the process at once: before the first step, while the held-out prompts are completed, and
in commands that do not train. It raises Stopped, which cleans up what is half written (atomic_folder.py) and becomes a line
and an exit code (errors.run_command). Everywhere else it is noted, and the loop stops at the next place where nothing is lost.
A second signal quits at once. Within a second of the first one it is taken for the same, because a launcher and a scheduler may
both deliver it.

Python calls a handler between two operations of the main thread, and never while that thread waits inside a library: for other
ranks, or for the threads of a download. A thread of each command therefore watches too. Where a signal should end the process at
once and has not done so after ten seconds, the thread does.
"""

import os
import select
import signal
import threading
import time
from contextlib import suppress

from minisft.errors import Stopped, tell

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME_SECONDS = 1.0  # a second signal within this time is the first one, delivered twice
UNWIND_SECONDS = 10.0
BEFORE_STEPS = "before the first step; the same command starts again"
IN_SAMPLES = "before the held-out prompts were completed; the model is written, and the same command completes them"


class StopSignal:
    """Handles SIGNALS inside a `with` block, at first by Stopped; does nothing outside the main thread.

    where: ends the sentence "stopped by SIGTERM". exit_code: of the process, None for 128 + the signal's number. is_command: the
    process ends with the block. Then it may be ended by the thread, and after a signal nothing interrupts its end.
    """

    def __init__(self, where: str = "", exit_code: int | None = None, *, is_command: bool = False):
        self.where, self.exit_code, self.is_command = where, exit_code, is_command
        self.received: str | None = None  # the name of the first signal
        self.then: str | None = None  # what happens after a signal that is noted; None: it ends the process at once
        self._received_at = 0.0
        self._previous: dict[signal.Signals, object] = {}
        self._is_over, self._pipe, self._previous_pipe = threading.Event(), -1, -1

    def note(self, then: str) -> None:
        """From now on a signal is noted, and `then` is printed. Raises Stopped for an earlier one that a library swallowed."""
        was_at_once, self.then = self.then is None, then
        if was_at_once and self.received:
            raise self._stopped(self.received)

    def end_at_once(self, where: str) -> None:
        """From now on a signal raises Stopped, and so does this call for one that has been noted. where: as in the class."""
        self.where, self.then = where, None
        if self.received:
            raise self._stopped(self.received)

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self
        if self.is_command:
            readable, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            # Python writes the number of a signal there when it arrives, whatever the main thread is doing
            self._previous_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(readable,), daemon=True).start()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:  # else a block inside this one has decided
                signal.signal(number, signal.SIG_IGN if self.is_command and self.received else handler)
        if self._pipe >= 0:
            self._is_over.set()
            signal.set_wakeup_fd(self._previous_pipe)
            os.close(self._pipe)

    def lose_reader(self) -> None:
        """The reader of the output has ended, as `tee` does at Ctrl-C or `head` once it has enough: the run saves and stops."""
        drop_unread_output()
        if self.received is None:
            self.received, self._received_at = signal.SIGPIPE.name, time.monotonic()
            tell("the reader of the output has ended: saving, then stopping")

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP:
            drop_unread_output()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
            if self.then is None:
                raise self._stopped(self.received)
            # print is not allowed to interrupt another print
            with suppress(OSError):  # Ctrl-C ends the `tee` behind a pipe too
                os.write(2, f"\nminisft: {self.received}: {self.then}; once more quits at once\n".encode())
        elif now - self._received_at > SAME_SECONDS:
            raise KeyboardInterrupt

    def _watch(self, readable: int) -> None:
        while number := os.read(readable, 1):
            if (
                self.then is not None or signal.getsignal(number[0]) != self._handle
            ):  # of another block, or none of SIGNALS
                continue
            if not self._is_over.wait(UNWIND_SECONDS) and self.then is None:
                stopped = self._stopped(signal.Signals(number[0]).name)
                with suppress(OSError):
                    os.write(2, f"minisft: {stopped}\n".encode())
                os._exit(stopped.exit_code)
        os.close(readable)

    def _stopped(self, name: str) -> Stopped:
        return Stopped(f"stopped by {name} {self.where}".rstrip(), self.exit_code or 128 + signal.Signals[name])


def drop_unread_output() -> None:
    """Drop what is printed from now on where nobody can read it: at a terminal that is closed, or in a pipe whose reader has
    ended. Every write is an error there."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")  # an error at a closed terminal
            unread = _has_hung_up(descriptor)
        except OSError:
            unread = True
        if unread:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def _has_hung_up(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
