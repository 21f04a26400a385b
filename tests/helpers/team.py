"""Processes in the environment that `torchrun` would give them, kept alive over several tests.

with Team(4) as team:
    results = team.run(function, argument)  # function(world, argument) in each: 4 results
"""

import os
import socket
import traceback

import torch

from .programs import fork_context


class Team:
    """`size` processes in a gloo group. The functions they run must be importable by name."""

    def __init__(self, size, timeout=30, patience=120):
        self.patience = patience  # seconds to wait for a result
        context = fork_context()  # one import of torch for all
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            own_end, process_end = context.Pipe()
            environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (process_end, environment, timeout)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self.pipes.append(own_end)
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
        """Call `function(world, *arguments)` in each process and return the results by rank. Fails
        with the tracebacks of those that fail."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(self.patience), f"rank {rank} hangs"
            outcomes.append(pipe.recv())
        failures = [f"rank {rank}:\n{trace}" for rank, (trace, _) in enumerate(outcomes) if trace]
        assert not failures, "\n".join(failures)
        return [result for _, result in outcomes]


def _work(pipe, environment, timeout):
    """One process: run what comes through the pipe and send back (traceback, result)."""
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
