"""How nice threads are to each other: answering goes before computing, computing before loading."""

import os
import threading


def give_way(niceness: int) -> None:
    """Makes this thread at least so nice. One that is nicer already (a service under `nice`) stays so: only root may go back."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))
