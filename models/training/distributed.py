"""The processes of a run: started here for ``training.devices``, or already started by torchrun or SLURM.

The strategy is Lightning's DDP without its module wrapper, because phases call parts of a model and average gradients
phase by phase (models.shares).
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from models.training.config import TrainingConfig

STARTED = "MI_KERNELS_STARTED_RANKS"


class Processes(NamedTuple):
    """devices: processes on this machine; nodes: machines. rank: this process among all of them.

    environment: Lightning's cluster environment, None if the processes have not been started.
    """

    devices: int = 1
    nodes: int = 1
    rank: int = 0
    environment: ClusterEnvironment | None = None

    @property
    def number(self) -> int:
        return self.devices * self.nodes


class Unwrapped(DDPStrategy):
    """Lightning's DDP without wrapping the model or reducing gradients. All ranks start with the weights of rank 0."""

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.detach(), 0)


def processes_of(devices: int) -> Processes:
    """The processes of this run. Raises ValueError if ``devices`` is neither 1 nor the number started by torchrun or
    SLURM."""
    found = _started() or Processes(devices)
    if found.environment is not None and devices not in (1, found.devices):
        raise ValueError(
            f"training.devices is {devices}, but {found.devices} processes were started on this machine; leave it out"
        )
    return found


def _started() -> Processes | None:
    env = os.environ
    if STARTED in env:
        return Processes(int(env[STARTED]), 1, int(env["LOCAL_RANK"]), LightningEnvironment())
    if TorchElasticEnvironment.detect():
        here = int(env["LOCAL_WORLD_SIZE"])
        return Processes(here, int(env["WORLD_SIZE"]) // here, int(env["RANK"]), TorchElasticEnvironment())
    # sbatch and salloc run one process; srun numbers the processes that it starts.
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1 and SLURMEnvironment.detect():
        nodes = int(env.get("SLURM_NNODES", 1))
        rank, environment = int(env["SLURM_PROCID"]), SLURMEnvironment(auto_requeue=False)
        return Processes(int(env["SLURM_NTASKS"]) // nodes, nodes, rank, environment)
    return None


def trainer_options(found: Processes) -> dict[str, Any]:
    """The options of Lightning's Trainer for these processes."""
    if found.number == 1:
        return {"devices": 1}
    assert found.environment is not None
    return {
        "devices": found.devices,
        "num_nodes": found.nodes,
        "strategy": Unwrapped(cluster_environment=found.environment),
    }


def check_shares(found: Processes, config: TrainingConfig, model: nn.Module) -> None:
    """Raises ValueError for batches with fewer rows than processes, and for layers that use statistics of the rows of a
    process."""
    if found.number == 1:
        return
    if config.batch_size < found.number:
        given = config.batch_size
        raise ValueError(f"batch_size must be at least the number of processes, {found.number}; got {given}")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name} normalises over the batch, of which each of {found.number} processes sees a part")


def launch(work: Callable[..., None], arguments: tuple[Any, ...], number: int) -> None:
    """Runs ``work(*arguments)`` in ``number`` new processes of one group and waits for them.

    If one process raises an exception, the others are stopped and the exception is raised here. All of them end with
    this process.
    """
    context = torch.multiprocessing.get_context("spawn")
    port, failed = _free_port(), context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // number)
    ranks = [
        context.Process(target=_rank, args=(rank, number, port, threads, failed, work, arguments), daemon=True)
        for rank in range(number)
    ]
    try:
        for process in ranks:
            process.start()
        running = list(ranks)
        while running and not any(process.exitcode for process in ranks):
            wait([process.sentinel for process in running])
            running = [process for process in running if process.is_alive()]
        _raise_first(ranks, failed)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
        for process in ranks:
            if process.pid is not None:
                process.join()


def _raise_first(ranks: list[Any], failed: Any) -> None:
    for rank, process in enumerate(ranks):
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            raise RuntimeError(f"process {rank} of {len(ranks)} was ended by {name}; continue with --resume")
    if any(process.exitcode for process in ranks):
        silent = "a process ended before it could train; its own message stands above"
        raise RuntimeError(silent) if failed.empty() else failed.get()


def _rank(
    rank: int, number: int, port: int, threads: int, failed: Any, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(_environment(rank, number, port))
    torch.set_num_threads(threads)
    try:
        work(*arguments)
    except BaseException as error:
        failed.put(_sendable(error))
        raise SystemExit(1) from None


def _environment(rank: int, number: int, port: int) -> Mapping[str, str]:
    return {
        STARTED: str(number),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """Makes a rank exit when its parent process is killed; otherwise it would wait for the other ranks forever."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
