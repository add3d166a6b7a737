"""What Ray makes of an error, told apart: what user code raised, and what died. Real errors of Ray, no Ray started."""

from __future__ import annotations

import traceback

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError, NodeDiedError, RayError, RayTaskError, WorkerCrashedError

from didr_core.types import DIDRError, NonFiniteError
from pipelines.cluster.remote import in_thread, users_mistake

SOURCE = "def score():\n    raise ERROR\nscore()"


def raised(error: BaseException, file: str = "/home/me/my_reward.py") -> BaseException:
    try:
        exec(compile(SOURCE, file, "exec"), {"ERROR": error})
    except BaseException as caught:
        return caught
    raise AssertionError


def stored(error: BaseException) -> RayTaskError:
    """``error`` as Ray keeps it where it was raised."""
    text = "".join(traceback.format_exception(error))
    return RayTaskError("score", text, error, proctitle="ray::Scorer.score", pid=1, ip="127.0.0.1", actor_id="a")


def crossed(error: BaseException) -> RayTaskError:
    """``error`` as `ray.get` raises it in another process."""
    return cloudpickle.loads(cloudpickle.dumps(stored(error).as_instanceof_cause()))


class Mine(Exception):
    def __init__(self, a: int, b: int) -> None:  # cannot be unpickled
        super().__init__(f"{a} and {b}")

    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")


WHERE = "(in score, /home/me/my_reward.py:2)"


@pytest.mark.parametrize("borders", [0, 1, 2])
def test_what_user_code_raised_is_told_whatever_it_crossed(borders: int) -> None:
    error: BaseException = raised(ValueError("my reward broke"))
    for _ in range(borders):
        error = raised(crossed(error), "/elsewhere/didr_core/train/loop.py")
    assert str(users_mistake(error)) == f"ValueError: my reward broke {WHERE}"


ADVICE = """Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure `...` if you believe this to be transient."""


@pytest.mark.parametrize("text", ["my reward broke", "two:\nlines"])
def test_ray_datas_advice_is_left_out(text: str) -> None:
    """It is appended to the text of what a stage raises."""
    said = str(users_mistake(crossed(crossed(raised(ValueError(f"{text}\n{ADVICE}"))))))
    assert said == f"ValueError: {text} {WHERE}"
    assert str(users_mistake(crossed(raised(KeyError(f"{text}\n{ADVICE}"))))) == f"KeyError: {text!r} {WHERE}"
    assert str(users_mistake(crossed(raised(DIDRError(f"{text}\n{ADVICE}"))))) == text


def test_an_error_that_cannot_travel_is_told_by_its_text() -> None:
    assert str(users_mistake(crossed(raised(Mine(1, 2))))) == f"Mine: 1 and 2 {WHERE}"


def test_an_actor_that_failed_to_load_is_no_death() -> None:
    init = ActorDiedError(stored(raised(ValueError("no such file"))))
    assert str(users_mistake(init)) == f"ValueError: no such file {WHERE}"
    assert str(users_mistake(crossed(init))) == f"ValueError: no such file {WHERE}"
    mine = ActorDiedError(stored(raised(DIDRError("reward.path='x': no such file"))))
    assert str(users_mistake(mine)) == "reward.path='x': no such file"


def test_a_mistake_in_our_words_keeps_them() -> None:
    found = users_mistake(crossed(crossed(raised(NonFiniteError("step 3: non-finite reward")))))
    assert str(found) == "step 3: non-finite reward"


@pytest.mark.parametrize("death", [WorkerCrashedError(), ActorDiedError(), NodeDiedError("n"), RayError("x")], ids=repr)
def test_a_death_is_nobodys_mistake(death: RayError) -> None:
    expected = type(death) is RayError  # plain: Ray could not carry the error itself, only its text
    assert bool(users_mistake(raised(death))) == bool(users_mistake(crossed(raised(death)))) == expected


def test_a_lost_peer_is_nobodys_mistake() -> None:
    lost = raised(RuntimeError("Connection closed by peer"), "/env/site-packages/torch/distributed/distributed_c10d.py")
    assert users_mistake(lost) is None
    assert users_mistake(raised(RuntimeError("Connection closed by peer"))) is not None


def test_a_thread_hands_on_what_it_raised() -> None:
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        in_thread(raised_again, KeyboardInterrupt("stopped")).result(10)
    assert in_thread(lambda: None).result(10) is None


def raised_again(error: BaseException) -> None:
    raise error
