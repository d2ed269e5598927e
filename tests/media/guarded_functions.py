"""What a guarded child is told to do in the tests."""

import os
import time

import numpy as np

from ldm_core.errors import BadMedia, UserError

held = []


class Stubborn(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(one + two)


def act(order, *more):
    return ORDERS[order](*more)


def loop():
    while True:
        pass


def loop_in_c():
    """A call that never returns and never lets another thread run."""
    return sum(iter(int, 1))


def hog(size):
    held.append(np.ones(size, np.uint8))
    return len(held)


def deaf_hog(size):
    """A decoder that takes a lack of memory for damage."""
    try:
        return hog(size)
    except MemoryError as error:
        raise BadMedia("decode", "undecodable", "MemoryError") from error


def fail(kind):
    raise {
        "bad": BadMedia("decode", "truncated", "at byte 7"),
        "user": UserError("install it"),
        "bug": KeyError("x"),
        "stubborn": Stubborn("a", "b"),
    }[kind]


ORDERS = {
    "echo": lambda *values: values,
    "pid": os.getpid,
    "loop": loop,
    "loop in C": loop_in_c,
    "sleep": lambda: time.sleep(1e6),
    "exit": lambda: os._exit(3),
    "abort": os.abort,
    "kill": lambda: os.kill(os.getpid(), 9),
    "hog": hog,
    "deaf hog": deaf_hog,
    "fail": fail,
    "zeros": lambda *shape: np.zeros(shape, np.uint8),
    "lambda": lambda: lambda: None,
    "limits": lambda: __import__("resource").getrlimit(4),
}
