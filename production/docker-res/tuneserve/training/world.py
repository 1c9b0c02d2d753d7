"""The processes that train together, and what they must agree on.

Started by `torch.distributed.run` (see `launch`), every process holds the whole model, takes its share of each batch
and adds up gradients with the others before it updates. Gradients are summed, not averaged over processes, and divided
by what the whole batch weighs: shares of unequal size, or none, give the step that one process would have made.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from tuneserve.errors import TuneserveError, WorkerError

PATIENCE = timedelta(hours=12)
"""How long a process waits for another, which may be reading a large data set; one that died is noticed at once."""
FAREWELL_S = 5.0
"""How long the leading process, which keeps the store of addresses, waits for the others after an error."""


class World:
    """Number `rank` of `size` processes, from 0; to a process alone, the methods have nothing to do."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @classmethod
    @contextmanager
    def joined(cls, environ: Mapping[str, str], device: torch.device) -> Iterator["World"]:
        """The world that torchrun's variables describe, for as long as the block runs.

        A TuneserveError of one process is raised in all that wait for it, on whatever machine they are.
        """
        if "TORCHELASTIC_RUN_ID" not in environ:
            yield cls()
            return
        world = cls(*(int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        if device.type == "cuda":
            torch.cuda.set_device(world.local_rank)
        store = _open_store(environ)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=PATIENCE,
        )
        failed = False
        try:
            yield world
        except TuneserveError as error:
            failed = True
            with suppress(RuntimeError):  # the leading process is gone, and the store with it
                store.set("error", json.dumps([str(error), error.exit_code]))
            raise
        except RuntimeError as error:  # so gloo and NCCL say that another process has left
            if other := _read_error(store):
                raise other from error
            raise
        finally:
            distributed.destroy_process_group()
            with suppress(RuntimeError):
                store.add("left", 1)
                deadline = time.monotonic() + FAREWELL_S
                while failed and world.leads and store.add("left", 0) < world.size and time.monotonic() < deadline:
                    time.sleep(0.05)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and the log."""
        return self.rank == 0

    @contextmanager
    def one_a_node_first(self) -> Iterator[None]:
        """Run the block in one process of each node, then in its others, which find what the first has cached."""
        if self.local_rank > 0:
            self._wait()
        yield
        if self.local_rank == 0:
            self._wait()

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            distributed.all_reduce(tensor)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by that of the leading process."""
        if self.size > 1:
            distributed.broadcast(tensor, src=0)

    def broadcast_text(self, text: str) -> str:
        """The text of the leading process."""
        texts = [text]
        if self.size > 1:
            distributed.broadcast_object_list(texts, src=0)
        return texts[0]

    def any(self, yes: bool) -> bool:
        """Whether any process says yes."""
        votes = torch.tensor(int(yes))
        self.add_up(votes)
        return bool(votes)

    def _wait(self) -> None:
        if self.size > 1:
            distributed.barrier()


def _read_error(store: Any) -> WorkerError | None:
    """The error that another process left for the others."""
    with suppress(RuntimeError):
        if store.check(["error"]):
            return WorkerError(*json.loads(store.get("error")))
    return None


def _open_store(environ: Mapping[str, str]) -> Any:
    """The key-value store in which the processes find each other's addresses.

    Where the launcher keeps one over restarts, addresses of an attempt that failed must not be found in it.
    """
    store, _, _ = next(distributed.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return distributed.PrefixStore(f"attempt {environ['TORCHELASTIC_RESTART_COUNT']}", store)  # type: ignore[attr-defined]


ALONE = World()
