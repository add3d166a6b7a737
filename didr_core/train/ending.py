"""How a training ends before its last step: by an error, told in words, or by Ctrl-C or SIGTERM."""

from __future__ import annotations

import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from didr_core.types import DIDRError

_FRAME = re.compile(r'^ *File "(.+)", line (\d+)(?:, in (.+))?$', re.MULTILINE)


@contextmanager
def stoppable(ask: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Ctrl-C and SIGTERM in the block first ``ask`` whether it will end by itself soon; if not, or a second time, they end it at once.

    Raises:
        SystemExit: 128 + the signal's number, as shells expect; its cause says at which step.
    """
    if threading.current_thread() is not threading.main_thread():  # no other one hears signals
        yield
        return
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1 or not ask():
            raise KeyboardInterrupt("stopped")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # such a block inside has told it
            raise
        interrupted = isinstance(error, KeyboardInterrupt)  # while Ray starts, it makes a SystemExit of SIGTERM
        number = came[0] if came else signal.SIGINT if interrupted else signal.SIGTERM
        how = interrupted and str(error)
        raise SystemExit(128 + number) from KeyboardInterrupt(f"{how or 'stopped'} ({signal.Signals(number).name})")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_words(error: BaseException) -> str:
    """What a person is told of ``error``: a DIDRError's own text, or ``ValueError: its text (in score, my_reward.py:12)``.

    Read from the traceback's text, all that some errors keep on their way between processes. The innermost frame outside of installed
    packages is named.
    """
    if isinstance(error, SystemExit) and error.__cause__:
        error = error.__cause__
    if isinstance(error, DIDRError | KeyboardInterrupt) and str(error):
        return str(error)
    text = "".join(traceback.format_exception(error))
    frames = list(_FRAME.finditer(text))
    # below the last frame: its source, indented, then the exception
    said = re.sub(r"\A([ \t].*\n|\n)*", "", text[frames[-1].end() if frames else 0 :]).strip()
    name, colon, rest = said.partition(": ")
    if name.startswith(f"{DIDRError.__module__}."):
        return rest
    own = [f for f in frames if f[1].endswith(".py") and "/lib/python" not in f[1]]
    where = "".join(f" (in {f[3]}, {f[1]}:{f[2]})" for f in (own or frames)[-1:])
    return name.rpartition(".")[2] + colon + rest + where
