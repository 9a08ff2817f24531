"""A process of a team, for torchrun: trains what a file of jobs says, one after another. Arguments:
that file, and `latents` of the mesh."""

import json
import sys

import torch

from jumprelu.activations import open_activations
from jumprelu.distributed import start
from jumprelu.recipe import TrainConfig
from jumprelu.train import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    team = start(int(sys.argv[2]), "cpu")
    for job in jobs:
        targets = open_activations(job["targets"]) if job.get("targets") else None
        config = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in job["config"].items()
        }
        seconds = job.get("checkpoint_seconds", 60)
        train(
            open_activations(job["store"]),
            TrainConfig(**config),
            job["out"],
            "cpu",
            seconds,
            10,
            targets,
            team,
        )
    team.close()
