"""Forks: what a child finds, which has one thread of its parent's, and all locks as they were."""

import os
import threading

at_fork = getattr(os, "register_at_fork", lambda **_: None)  # there are systems without forks


def over_forks(lock):
    """A lock that a fork waits for: else a child could find it taken, by a thread that it doesn't have."""
    at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


#: Held while a library computes that a fork would leave half-way. A lock under which somebody asks for this
#: one has to be made later: a fork takes the latest first.
computing = over_forks(threading.Lock())
