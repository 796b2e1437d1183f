"""Starting ranks on this machine, and what a rank's process does when it fails.

A script that starts its own two ranks begins with

    if not launch.is_rank():
        sys.exit(launch.start_ranks(2, [__file__, *sys.argv[1:]]))
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence as Seq
from datetime import timedelta

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from qwen3cp.errors import CommunicationError, ParallelConfigError, Qwen3CPError

__all__ = ["exit_code_of", "is_rank", "report_error", "start_ranks"]

logger = logging.getLogger("qwen3cp")

SECONDS_TO_END = 5
STORE_TIMEOUT = timedelta(seconds=10)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def is_rank() -> bool:
    """Whether torchrun, `accelerate launch` or `start_ranks` has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(num_ranks: int, arguments: Seq[str]) -> int:
    """Runs `python ARGUMENTS...` on so many ranks of this machine, and waits for all of them.

    The ranks share this process's standard streams and environment. OMP_NUM_THREADS is the cores
    that this process may use, divided by the ranks, unless it is set. If a rank fails, or on
    Ctrl-C, the others are ended.

    Returns:
        The exit code for this process: 0; 2 if a rank ended with 2; 1 if one failed otherwise;
        128 + the number of the signal that ended this process.
    """
    if num_ranks < 1:
        raise ParallelConfigError(f"the number of ranks must be positive, got {num_ranks}")
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # the launcher would replace ${local_rank} in arguments, and $$ by $
    escaped = [argument.replace("$", "$$") for argument in arguments]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id="qwen3cp",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=SECONDS_TO_END,
        )
        if not logger.isEnabledFor(logging.DEBUG):
            logging.disable(logging.CRITICAL)  # the launcher's account of what the ranks report
        try:
            elastic_launch(config, sys.executable)(*escaped)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except SignalException as error:
            return 128 + error.sigval
        else:
            return 0
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:  # a rank that fails by itself says why
            print(f"error: rank {rank} was ended by {_signal_name(-code)}", file=sys.stderr)
            break
    return 2 if 2 in codes.values() else 1


def report_error(error: BaseException) -> None:
    """Prints `error: ...` on stderr, unless another rank has printed its own. Not collective.

    An error of this package is one line, without a traceback unless the logger `qwen3cp` is at
    DEBUG. Any other comes with its traceback.
    """
    if isinstance(error, CommunicationError):
        # usually what the failure of another rank looks like: that one goes first
        time.sleep(1)
    if not _is_first_to_report():
        return
    expected = isinstance(error, Qwen3CPError)
    if not expected or logger.isEnabledFor(logging.DEBUG):
        traceback.print_exception(error)
    message = " ".join(str(error).split())
    name = "" if expected else f"{type(error).__name__}: "
    print(f"error: {name}{message}", file=sys.stderr, flush=True)


def _is_first_to_report() -> bool:
    """Asks the store that the ranks meet at; it belongs to whoever started them."""
    if not is_rank():
        return True
    try:
        store = next(iter(rendezvous("env://", timeout=STORE_TIMEOUT)))[0]
        return store.add("qwen3cp/errors", 1) == 1
    except (RuntimeError, ValueError):  # it has ended, and what was printed is not known
        return True


def exit_code_of(error: BaseException) -> int:
    """2 for a mistake of the user, which is a ValueError of this package; else 1."""
    return 2 if isinstance(error, Qwen3CPError) and isinstance(error, ValueError) else 1


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
