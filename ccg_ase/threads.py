"""One torch thread where the work is small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, and restore the number of threads afterwards.

    On small graphs a second thread never helps, and next to another busy process its spinning made
    a 3 ms call take 370 ms.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
