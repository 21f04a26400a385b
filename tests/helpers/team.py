"""Processes that stay up over several tests, as `torchrun` would start them, but sooner.

with Team(4) as team:
    results = team.run(function, argument)  # function(world, argument) in each: 4 results
"""

import os
import socket
import traceback

import torch
import torch.multiprocessing


class Team:
    """`size` processes in a gloo group. What is run must be importable by name."""

    def __init__(self, size, timeout=30, patience=120):
        self.patience = patience  # seconds to wait for a result
        context = torch.multiprocessing.get_context("forkserver")  # one import of torch for all
        context.set_forkserver_preload(
            ["mlsae.training.state", "mlsae.training.validation", "torch._dynamo"]
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (theirs, environment, timeout)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()

    def run(self, function, *arguments):
        """What `function(world, *arguments)` returns in each process; its failure, if any."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(self.patience), f"rank {rank} hangs"
            outcomes.append(pipe.recv())
        failed = [f"rank {rank}:\n{said}" for rank, (said, _) in enumerate(outcomes) if said]
        assert not failed, "\n".join(failed)
        return [result for _, result in outcomes]


def _work(pipe, environment, timeout):
    from mlsae import distributed

    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    with distributed.session(timeout) as world:
        while (task := pipe.recv()) is not None:
            function, arguments = task
            try:
                pipe.send((None, function(world, *arguments)))
            except Exception:
                pipe.send((traceback.format_exc(), None))
