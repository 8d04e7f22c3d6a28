"""The watch over the other ranks: if one of them fails or falls silent, every rank ends, and says which one it was.

A rank that waits for another one in a sum over the ranks learns nothing when that one is killed or stopped: NCCL waits on, and
gloo raises an error that names nobody. So a thread of each rank writes a beat into the launcher's store every BEAT seconds and
looks at the beat of the rank after its own. A killed process, a stopped one (SIGSTOP) and a lost machine look the same: their
beat stays what it was. A rank that fails leaves its message and its exit code in the store before it ends. Whoever finds either
prints it and ends its process at once with that code, wherever its main thread is: all that the run has saved is whole.

A rank leaves the watch only when all ranks are done, so that none of them ends with 0 where another one fails later.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import Store

from minisft.errors import INTERNAL, PEER, rank_name, tell

BEAT = 2.0  # seconds between two looks
SILENCE = 20.0  # seconds without a beat after which a rank is given up; all have ended ten seconds later
SUSPICIOUS = 6.0  # the same once a sum over the ranks has failed: torchrun leaves 30 seconds
# Seconds that a rank may still work after another one failed: it may be about to fail, and save, the same way.
GRACE = 5.0
LAST_WORD = 5.0  # seconds that the rank whose process holds the store waits for the others to read it
START = timedelta(hours=24)  # that ranks may be apart at first: one tokenises while another has found its cache
ANSWER = timedelta(seconds=10)  # that the store may take


class Watch:
    """A context manager that all ranks enter, before they join their group, and leave together.

    store: one that no other thread uses. Leaving it with an error tells the other ranks, and does not wait for them.
    """

    def __init__(self, store: Store, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.leaves = threading.Event()
        self.suspects = False
        self.failure: tuple[int, str] | None = None  # exit code and message of this rank
        self.holder = "the launcher"  # of the store
        self.looked_at = time.monotonic()  # when the thread last had an answer from the store
        self.thread = threading.Thread(target=self._look, name="peers", daemon=True)
        self.guard = threading.Thread(target=self._guard, name="peers-guard", daemon=True)

    def __enter__(self):
        self.store.set(f"name/{self.rank}", rank_name())
        self.store.set(f"beat/{self.rank}", "0")
        self.store.wait([f"beat/{self._next()}", "name/0"], START)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun keeps the store in a process of its own
            self.holder = self.store.get("name/0").decode()
        self.store.set_timeout(ANSWER)
        self.looked_at = time.monotonic()
        self.thread.start()
        self.guard.start()
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else INTERNAL)
            self.failure = code, str(error)
        self.leaves.set()
        self.thread.join()

    def wait_for_word(self) -> None:
        """For the main thread, when a sum over the ranks has raised: the watch will learn why, and end the process. Returns if it
        does not."""
        self.suspects = True
        time.sleep(SUSPICIOUS + GRACE + 4 * BEAT)

    # ---- the thread, which alone uses the store ---------------------------------------------------------------------

    def _look(self) -> None:
        count, last_beat, heard_at, is_done = 0, b"", time.monotonic(), False
        while True:
            if self.leaves.wait(BEAT):
                time.sleep(0.02)
            try:
                if self.failure:
                    self._report(self.rank, *self.failure)
                    return self._part()
                if self.leaves.is_set() and not is_done:
                    is_done = self.store.add("done", 1) > 0
                if self.store.add("failed", 0):
                    word = self._first_report()
                    if self.leaves.wait(GRACE) and self.failure:
                        continue
                    return self._end(*word)
                if self.store.add("done", 0) == self.world_size:
                    return self._part()
                count += 1
                self.store.set(f"beat/{self.rank}", str(count))
                beat = self.store.get(f"beat/{self._next()}")
            except Exception as error:  # a connection that is gone stays gone
                if self.failure:
                    return
                reason = (str(error).splitlines() or [""])[0][:200]
                return self._end(f"{self.holder} is gone, and with it the store by which ranks meet ({reason})", PEER)
            self.looked_at = time.monotonic()
            if beat != last_beat:
                last_beat, heard_at = beat, time.monotonic()
            elif (silence := time.monotonic() - heard_at) > (SUSPICIOUS if self.suspects else SILENCE):
                silent = f"no sign of life for {silence:.0f} s: it was killed or stopped, or its machine is gone"
                self._report(self._next(), PEER, silent)
                return self._end(*self._first_report())

    def _guard(self) -> None:
        """A store whose process is stopped never answers, and `_look` waits for it: ends the process then."""
        while self.thread.is_alive():
            self.thread.join(BEAT)
            if self.thread.is_alive() and time.monotonic() - self.looked_at > SILENCE + GRACE:
                self._tell_and_exit(f"{self.holder} does not answer: it was stopped, or is unreachable", PEER)

    def _next(self) -> int:
        return (self.rank + 1) % self.world_size

    def _report(self, rank: int, code: int, message: str) -> None:
        """Leave word that a rank failed. The first word is the one that counts."""
        self.store.compare_set("report", "", f"{rank} {code} {message}")
        self.store.add("failed", 1)

    def _first_report(self) -> tuple[str, int]:
        number, code, message = self.store.get("report").decode().split(" ", 2)
        if int(number) == self.rank:  # it was stopped, and goes on now
            return f"the other ranks gave this one up: {message}", int(code)
        return f"the run ends because of {self.store.get(f'name/{number}').decode()}: {message}", int(code)

    def _part(self) -> None:
        """The last use of the store. The process that may hold it stays until the others have read theirs."""
        until = time.monotonic() + LAST_WORD
        self.store.add("parted", 1)
        while self.rank == 0 and self.store.add("parted", 0) < self.world_size and time.monotonic() < until:
            time.sleep(0.02)

    def _end(self, message: str, code: int) -> None:
        with suppress(Exception):
            self._part()
        self._tell_and_exit(message, code)

    def _tell_and_exit(self, message: str, code: int) -> None:
        tell(f"error: {message}")
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code)  # the main thread may be in a call that never returns
