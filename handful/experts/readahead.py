"""Threads that read experts from a pack into memory while others compute.

What is needed now is read first, what is only guessed to be needed soon after it, in the order asked for. Half of the
threads leave guesses alone, so that what is needed next finds the disk free enough.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Read", "Reader"]

ExpertId = tuple[int, int]  # (layer, expert)


class Read:
    """One expert on its way into a slot.

    finish   is called with it, under the reader's lock, once `error` is what became of it (None: it is there).
    """

    __slots__ = ("done", "error", "finish", "key", "slot")

    def __init__(self, key: ExpertId, slot: int, finish: Callable[[Read], None]) -> None:
        self.key, self.slot, self.finish = key, slot, finish
        self.done = False
        self.error: Exception | None = None


class Reader:
    """`threads` of them, all doing `load(layer, expert, slot)`. Its condition's lock is the lock of all that `finish`
    touches. They do not keep a process alive."""

    def __init__(self, load: Callable[[int, int, int], None], threads: int) -> None:
        lock = threading.RLock()
        self.cond = threading.Condition(lock)  # of who waits for reads
        self._work = threading.Condition(lock)  # of the threads: one is woken for each read, no more
        self._load = load
        self._needed: deque[Read] = deque()
        self._guessed: deque[Read] = deque()
        self._reading = 0  # of all, those that are being read
        self._guessing = 0  # of guesses
        self._guessers = max(1, threads // 2)
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"handful-reader-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Read, *, guess: bool = False) -> None:
        with self.cond:
            (self._guessed if guess else self._needed).append(read)
            self._work.notify()

    def hurry(self, read: Read) -> None:
        """A guess came true: if it has not begun, it is read with what is needed."""
        with self.cond:
            if read in self._guessed:
                self._guessed.remove(read)
                self._needed.append(read)
                self._work.notify()  # one that leaves guesses alone

    def cancel(self, read: Read) -> bool:
        """Take back a guess; False: it has begun."""
        with self.cond:
            if read not in self._guessed:
                return False
            self._guessed.remove(read)
            return True

    def wait(self, until: Callable[[], bool]) -> float:
        """Wait for reads until something holds, which is asked after each of them; the seconds it took."""
        began = time.perf_counter()
        with self.cond:
            self.cond.wait_for(until)
        return time.perf_counter() - began

    def drain(self) -> None:
        """Forget what has not begun, and wait for what has."""
        with self.cond:
            self._needed.clear()
            self._guessed.clear()
            self.cond.wait_for(lambda: not self._reading)

    def stop(self) -> None:
        """End the threads, after the reads that they are in the middle of; what has not begun is forgotten."""
        with self.cond:
            self._stopping = True
            self._needed.clear()
            self._guessed.clear()
            self._work.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # which may be one of them, when it drops the last reference
                thread.join()
        self._load = _nothing  # and with it the memory that it reads into

    def _may_guess(self) -> bool:
        return bool(self._guessed) and self._guessing < self._guessers

    def _run(self) -> None:
        while True:
            with self.cond:
                self._work.wait_for(lambda: self._stopping or self._needed or self._may_guess())
                if self._stopping:
                    return
                guess = not self._needed
                read = (self._guessed if guess else self._needed).popleft()
                self._reading += 1
                self._guessing += guess
            try:
                self._load(*read.key, read.slot)
            except Exception as error:
                read.error = error
            with self.cond:
                self._reading -= 1
                self._guessing -= guess
                read.done = True
                read.finish(read)
                self.cond.notify_all()
            del read


def _nothing(layer: int, expert: int, slot: int) -> None:
    """What a stopped reader does."""
