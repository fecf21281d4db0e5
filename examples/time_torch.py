"""Merging over time from a PyTorch training script: each stage is one command, and checkpoints are plain .pt files.

    python examples/time_torch.py [DIRECTORY]

A small network learns three classification tasks one after another; two others are never trained. `cfmerge time` keeps
the store; the script trains, evaluates, and hands over files. Stopped and started again with the same DIRECTORY, it
goes on where it was.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TASKS, HELD_OUT = ["red", "green", "blue"], ["grey", "black"]
CENTRES = 3 * torch.randn(len(TASKS) + len(HELD_OUT), 5, 8, generator=torch.Generator().manual_seed(0))


def cfmerge(*arguments):
    """Runs a command of cfmerge; returns what it prints as JSON."""
    command = [sys.executable, "-m", "cfmerge", "time", *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))


def data(task, count, seed):
    """Blobs around five centres of the task, and their classes; the classes of all tasks lie alike, roughly."""
    number = (*TASKS, *HELD_OUT).index(task)
    centres = 0.6 * CENTRES.mean(0) + 0.5 * CENTRES[number]
    random = torch.Generator().manual_seed(1000 * seed + number)
    labels = torch.randint(5, (count,), generator=random)
    return centres[labels] + 0.9 * torch.randn(count, 8, generator=random), labels


def train(model, sets, steps, rate):
    optimizer = torch.optim.Adam(model.parameters(), rate)
    inputs, labels = (torch.cat(parts) for parts in zip(*sets, strict=True))
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,), generator=random)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    return model


def accuracy(model, task):
    inputs, labels = data(task, 1000, seed=1)
    with torch.no_grad():
        return float((model(inputs).argmax(-1) == labels).float().mean())


def load(path):
    model = network()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def main(directory):
    base, store = directory / "base.pt", directory / "store"
    if not base.exists():
        torch.save(train(network(), [data(t, 20, seed=2) for t in (*TASKS, *HELD_OUT)], 60, 1e-3).state_dict(), base)
    names = [word for task in TASKS for word in ("--task", task)]
    names += [word for task in HELD_OUT for word in ("--held-out", task)]
    rules = ["--protocol", "best-in-time", "--weight", 0.5, "--window", 2]
    start = directory / "start.pt"
    state = cfmerge("init", store, "--base", base, *rules, *names, "-o", start, "--overwrite")
    while state["left"]:
        task = state["left"][0]
        expert = train(load(start), [data(task, 500, seed=0)], 200, 3e-3)
        torch.save(expert.state_dict(), directory / "expert.pt")  # the store has its own copy
        cfmerge("store", store, directory / "expert.pt", "--task", task)
        served = cfmerge("deploy", store, "-o", directory / "served.pt", "--overwrite")["output"]
        model = load(served)
        (directory / "scores.json").write_text(json.dumps({t: accuracy(model, t) for t in (*TASKS, *HELD_OUT)}))
        cfmerge("evaluate", store, directory / "scores.json")
        state = cfmerge("init", store, "-o", start, "--overwrite")
    print("task       accumulation  retention  geometric mean")
    for row in cfmerge("report", store)["rows"][1:]:
        numbers = (row[key] for key in ("knowledge_accumulation", "zero_shot_retention", "geometric_mean"))
        print(f"{row['expert']:10}  {'  '.join(f'{number:.3f}' for number in numbers)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(Path(directory))
