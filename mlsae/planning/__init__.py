"""What a training will take, before it runs: memory, disk, time."""
