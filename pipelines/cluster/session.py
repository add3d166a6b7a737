"""Start Ray, or attach to it, quietly: one context manager for a laptop, a cluster and a job.

    with ray_session(address, slots(config), verbose) as cluster:
        room = await_room(demands_for, cluster, print)

Three cases, told apart by :func:`where_to_run`:

- **Here** (no address): a Ray of our own, `ray.init("local", num_cpus=...)`. Without "local" Ray would join whatever runs on this host.
- **In a job** (`ray job submit`): attach to the job's cluster. Workers import this package from the job's working directory.
- **Attached** (an address, from the head node): `pipelines`, `didr_core` and `tune_spaces` travel to the workers as `py_modules`, so that
  every node runs the code of this checkout, not of whatever is installed there.

A Ray of our own listens on 127.0.0.1 alone, and is protected by a token in `~/.ray/auth_token`, which this user alone may read. An attached
cluster that uses tokens needs `RAY_AUTH_MODE=token` and the same token here; see docs/cluster.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from didr_core.config import Config
from didr_core.types import DIDRError
from pipelines.cluster.resources import ClusterView, Demands, Node, NoRoom, Room, check, taken

ALWAYS_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # report() drains at this poll; Ray's 2 s would make every report cost 2 s
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # or relative paths of the recipe would mean something else on a trainer than in the preflight
}
QUIET_ENV = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # one run wrote 7,000 lines without
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
HERE_ENV = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away, and its process costs seconds of the start
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # where no cluster is to be, Ray listens on 127.0.0.1; on Linux, too
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",  # so do the workers' collective calls
}
"""Of a Ray of our own; nobody outside of this machine is let in."""
TOKEN = Path.home() / ".ray" / "auth_token"
WAIT_FOR_NODES_S = 600.0
"""How long to wait for the nodes of a cluster that may still be starting."""
WAIT_FOR_OTHERS_S = 3600.0
"""How long to wait for what other jobs hold."""
LOOK_S = 10.0
STARTUP_TIMEOUT = "timed out during startup"  # what Ray says when a helper was too slow
SOCKET_PATH = 107  # characters that Linux allows
SOCKET = (
    "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # Ray's longest, below its temporary folder
)
PACKAGES = ("didr_core", "pipelines", "tune_spaces")
_JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's job supervisor sets it for the entrypoint of a submitted job, nobody else does


@dataclass(frozen=True)
class Place:
    """Where Ray is: `here` starts one, `job` and `attached` join the one at `address`."""

    kind: Literal["here", "job", "attached"]
    address: str = ""


def inside_ray_job() -> bool:
    """Is this process the entrypoint of `ray job submit`?"""
    return bool(os.environ.get(_JOB_ENV))


def where_to_run(address: str | None) -> Place:
    """Decide between a Ray of our own and the one at `address` (or RAY_ADDRESS); `"local"` insists on our own.

    Raises:
        DIDRError: an address Ray Train cannot work with (a Ray Client or dashboard URL); see :func:`_here`, :func:`_refuse_shadows`.
    """
    _refuse_shadows(Path.cwd())
    if inside_ray_job():
        return Place("job", os.environ.get("RAY_ADDRESS", "auto"))
    if address == "local":
        return _here()
    source = "address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        return _here()
    if address.startswith(("ray://", "http://", "https://")):
        raise DIDRError(
            f"{source}={address}: this is the URL of a dashboard or a Ray Client server; training needs the cluster itself."
            " From outside say `ray job submit --working-dir . -- python -m pipelines.align ...`; on the head node use `auto` or"
            f" HOST:6379; to run on this machine alone {'leave it out' if source == 'address' else 'unset it'}."
        )
    return Place("attached", address)


def _here() -> Place:
    """A Ray of our own, whose sockets lie deep below the temporary folder.

    Raises:
        DIDRError: a folder so long that the system gives no socket such a name.
    """
    key = next((key for key in ("RAY_TMPDIR", "TMPDIR") if key in os.environ), "")
    if key and (longest := SOCKET_PATH - len(SOCKET)) < len(os.environ[key]):
        raise DIDRError(
            f"{key}={os.environ[key]!r}: {len(os.environ[key])} characters, and Ray's sockets in it leave room for {longest}. Set"
            " RAY_TMPDIR=/tmp, or another short folder on this machine."
        )
    return Place("here")


def slots(config: Config) -> int:
    """CPUs that a Ray of our own is told it has."""
    return max(config.workers.local_cpus, os.cpu_count() or 1)


def _refuse_shadows(folder: Path) -> None:
    """Ray's workers look for modules in the driver's folder first: a package of the user's there would stand in for ours.

    Raises:
        DIDRError: there is one.
    """
    ours = Path(__file__).parents[2]
    for name in PACKAGES:
        for file in (folder / name / "__init__.py", folder / f"{name}.py"):
            if file.is_file() and file.resolve() != (ours / name / "__init__.py").resolve():
                raise DIDRError(
                    f"{file}: has the name of DIDR's own package {name!r}, and Ray's workers would import yours in its place. Start "
                    "`didr` in another folder (recipes and options take paths), rename yours, or add --local."
                )


def view_of_this_machine(config: Config, address: str | None, cpus: int | None = None) -> ClusterView | None:
    """What a Ray of our own will have (``cpus``: its CPU slots), known before it starts; None where a cluster must be asked."""
    if where_to_run(address).kind != "here":
        return None
    import torch

    has = {"CPU": cpus or slots(config), "GPU": torch.cuda.device_count()}
    return ClusterView((Node("this machine", has),), local=True)


def prepare_environment(verbose: bool = False, *, here: bool = False) -> None:
    """Set what Ray reads from the environment, keeping what the user has set. Call before the first `import ray`.

    Args:
        here: this process starts a Ray of its own.
    """
    for key, value in (ALWAYS_ENV | ({} if verbose else QUIET_ENV) | (HERE_ENV if here else {})).items():
        os.environ.setdefault(key, value)


@contextmanager
def ray_session(address: str | None = None, num_cpus: int = 4, verbose: bool = False) -> Iterator[ClusterView]:
    """Ray for the length of the block; yields its nodes. Inside a session (a Tune trial, say) it uses the one that is there.

    Args:
        address: None (RAY_ADDRESS, or a Ray of our own), "local", "auto", or HOST:PORT of a cluster's head.
        num_cpus: CPU slots (not cores) of a Ray of our own; ignored when attaching, whose nodes say themselves what they have.
        verbose: show Ray's own log, progress bars and workers' output.

    Raises:
        DIDRError: no cluster at the address, or it refused this process.
    """
    place = where_to_run(address)
    prepare_environment(verbose, here=place.kind == "here")
    import ray

    if ray.is_initialized():
        yield cluster_view()
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    level = "INFO" if verbose else "ERROR"
    with warnings.catch_warnings():
        if not verbose:
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.")
        if place.kind == "here":
            _start(num_cpus, verbose, level)
        else:
            _attach(place, verbose, level)
    if threading.current_thread() is threading.main_thread():  # Ray's own would exit in the middle of its C++
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield cluster_view(place.kind == "here")
    finally:
        ray.shutdown()


def cluster_view(local: bool = False, *, answering: bool = False) -> ClusterView:
    """The nodes that are up now, but for those that are about to leave (spot notices), with their total resources and labels.

    Args:
        answering: ask each one: Ray's head takes up to 15 s to notice that a node is dead.
    """
    import ray
    from ray._private.state import state

    leaving = state.get_draining_nodes()
    there = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
    if answering and there:
        with ThreadPoolExecutor(min(32, len(there))) as pool:
            there = [n for n, found in zip(there, pool.map(_answers, there), strict=True) if found]
    nodes = [
        Node(
            str(n.get("NodeManagerHostname") or n["NodeManagerAddress"]),
            dict(n["Resources"]),
            dict(n.get("Labels") or {}),
            n["NodeID"],
        )
        for n in there
    ]
    return ClusterView(
        tuple(sorted(nodes, key=lambda n: n.name)),
        local,
        # Ray's label of nodes that a launcher or an operator starts; those of a person have none
        grows=any("ray.io/node-group" in node.labels for node in nodes),
        free=None if local else ray.available_resources(),
    )


def nodes_in_use() -> set[str]:
    """Ids of the nodes that actors of this job are on."""
    import ray
    from ray._private.state import state

    actors = state.actor_table(None, ray.JobID.from_hex(ray.get_runtime_context().get_job_id()), "ALIVE")
    return {actor["Address"]["NodeID"] for actor in actors.values()}


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        _is_anyone_there(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    except DIDRError:
        return False
    return True


def await_room(
    demands_for: Callable[[ClusterView], Demands],
    cluster: ClusterView,
    say: Callable[[str], None],
    look: Callable[[], ClusterView] | None = None,
) -> Room:
    """Check the plan against the cluster. `say` what is waited for: nodes that may still be starting, what other jobs hold just now.

    Raises:
        NoRoom: at once where nobody starts nodes, after ten minutes where somebody does, after an hour of waiting for others.
    """
    began = time.monotonic()
    while True:
        try:
            room = check(demands_for(cluster), cluster)
            short, what, limit = taken(room.demands, cluster), "for room", WAIT_FOR_OTHERS_S
            if not short:
                return room
        except NoRoom as error:
            short, what, limit = str(error), "for nodes", WAIT_FOR_NODES_S if cluster.grows else 0.0
        left = began + limit - time.monotonic()
        if left <= 0:
            raise NoRoom(short)
        say(f"waiting {what}, {left:.0f} s more: {short}")
        time.sleep(min(LOOK_S, max(0.1, left)))
        cluster = (look or cluster_view)()


def pulse() -> Callable[[], None]:
    """A look whether Ray's head and this machine's raylet live, which raises DIDRError if not: Ray would end us without a word."""
    import ray

    context = ray.get_runtime_context()
    here = [n for n in ray.nodes() if n["NodeID"] == context.get_node_id()]
    doors = [context.gcs_address, *(f"{n['NodeManagerAddress']}:{n['NodeManagerPort']}" for n in here)]

    def look() -> None:
        for door in doors:
            _is_anyone_there(door, 30.0)

    return look


def _start(slots: int, verbose: bool, level: str) -> None:
    """A Ray of our own. On a busy machine Ray's helpers may miss its fixed 15 s: once more, then they come from a warm disk cache."""
    import ray

    with suppress(OSError):  # a home that cannot be written to
        TOKEN.parent.mkdir(mode=0o700, exist_ok=True)
    for last in (False, True):
        try:
            ray.init(
                "local",
                num_cpus=slots,
                include_dashboard=verbose,
                log_to_driver=verbose,
                logging_level=level,
            )
            with suppress(OSError):  # Ray lets everybody read it
                TOKEN.chmod(0o600)
            return
        except Exception as error:
            ray.shutdown()
            if STARTUP_TIMEOUT not in str(error):
                raise
            if last:
                raise DIDRError(
                    "Ray did not start here within its time, twice. The machine is very busy (see `uptime`), or short of memory or of"
                    " space in the temporary folder; `--local` trains without Ray."
                ) from error


def _attach(place: Place, verbose: bool, level: str) -> None:
    import ray

    _is_anyone_there(place.address)
    environment: dict[str, Any] = {"env_vars": _worker_env(verbose)}
    if place.kind == "attached":
        environment["py_modules"] = [str(p) for p in package_folders()]
    try:
        # No num_cpus: the cluster says what it has. In a job Ray merges this with the job's own runtime_env.
        ray.init(place.address, runtime_env=environment, log_to_driver=verbose, logging_level=level)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise DIDRError(
            f"could not join the Ray cluster at {place.address}: {error}\nIs it up (`ray status`), of this Ray version ({ray.__version__}),"
            f" and, if it uses tokens, is RAY_AUTH_MODE=token set with the same token here? (RAY_AUTH_MODE is"
            f" {os.environ.get('RAY_AUTH_MODE', 'unset')}; see docs/cluster.md)"
        ) from error


def _is_anyone_there(address: str, patience_s: float = 5.0) -> None:
    """Ray tries for half a minute to reach a head that is not there; a socket knows at once."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=patience_s).close()
    except OSError as error:
        raise DIDRError(
            f"no Ray cluster answers at {address} ({error}): it is not up, or was killed. Start one (`ray start --head`), or leave"
            " the address out to run here."
        ) from error


def _worker_env(verbose: bool) -> dict[str, str]:
    """Our environment for workers on other machines, without what the job has set itself (Ray refuses a variable set twice)."""
    wanted = ALWAYS_ENV if verbose else ALWAYS_ENV | QUIET_ENV
    job = json.loads(os.environ.get(_JOB_ENV) or "{}")
    taken = ((job.get("runtime_env") or {}).get("env_vars") or {}).keys()
    return {key: os.environ.get(key, value) for key, value in wanted.items() if key not in taken}


def package_folders() -> list[Path]:
    """The folders of this checkout's packages; a package that is missing (a partial install) is left out."""
    found = map(importlib.util.find_spec, PACKAGES)
    return [Path(spec.origin).parent for spec in found if spec and spec.origin]
