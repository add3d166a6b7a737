"""How a training ends early: errors in words, signals, and the file that asks for it."""

from __future__ import annotations

import os
import signal

import pytest

from didr_core.train.ending import in_words, stoppable
from didr_core.types import DIDRError


def caught(code: str, name: str = "/home/me/my_reward.py") -> Exception:
    try:
        exec(compile(code, name, "exec"), {"DIDRError": DIDRError, "__name__": "my_reward"})
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


SCORE = "def score():\n    {}\nscore()"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("raise ValueError('my reward broke')", "ValueError: my reward broke (in score, /home/me/my_reward.py:2)"),
        ("raise ValueError", "ValueError (in score, /home/me/my_reward.py:2)"),
        ("raise ValueError('two:\\n  lines')", "ValueError: two:\n  lines (in score, /home/me/my_reward.py:2)"),
        ("import json; json.loads('{')", "JSONDecodeError: Expecting property name enclosed in double quotes"),
        ("raise type('Mine', (Exception,), {})('x')", "Mine: x (in score, /home/me/my_reward.py:2)"),
        ("raise DIDRError('reward.path: a: b')", "reward.path: a: b"),
    ],
)
def test_an_error_is_told_with_type_text_and_the_users_line(line: str, words: str) -> None:
    told = in_words(caught(SCORE.format(line)))
    assert told.startswith(words) and told.count("my_reward.py:2") == ("DIDRError" not in line)


def test_the_last_of_chained_errors_is_told() -> None:
    error = caught("try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise KeyError('mine')")
    assert in_words(error) == "KeyError: 'mine' (in <module>, /home/me/my_reward.py:4)"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_first_and_ends_the_second_time(number: signal.Signals, code: int) -> None:
    before, asked = signal.getsignal(number), []
    with pytest.raises(SystemExit) as stopped, stoppable(lambda: bool(asked.append(1) or True)):
        os.kill(os.getpid(), number)
        assert asked == [1]
        os.kill(os.getpid(), number)
    assert asked == [1] and stopped.value.code == code and in_words(stopped.value) == f"stopped ({number.name})"
    assert signal.getsignal(number) is before


def test_where_there_is_no_step_to_end_a_signal_ends_at_once() -> None:
    with pytest.raises(SystemExit, match="143"), stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")


def test_what_the_block_made_of_a_signal_keeps_its_code() -> None:
    with pytest.raises(SystemExit) as stopped, stoppable(lambda: True):
        os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt("stopped after step 3")
    assert (stopped.value.code, in_words(stopped.value)) == (143, "stopped after step 3 (SIGTERM)")
    with pytest.raises(SystemExit) as stopped, stoppable():
        raise SystemExit(15)  # Ray's own handler
    assert stopped.value.code == 143


def test_a_run_that_ends_all_the_same_has_ended() -> None:
    with stoppable(lambda: True):
        os.kill(os.getpid(), signal.SIGTERM)
