"""Trains a small torch model, and merges its last checkpoints in memory while they are still there.

    python examples/torch_checkpoints.py

The optimizer's steps are long, so that the model circles around its optimum: a merge of the last checkpoints lies
nearer to it than any of them. A checkpoint is a clone: without it all would be the tensors that training goes on with.
"""

import torch

import cfmerge

STEPS, KEPT = 600, 8


def make_model():
    return torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))


def make_data(count, teacher):
    inputs = torch.randn(count, 8)
    with torch.no_grad():
        return inputs, teacher(inputs)


def checkpoint(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def main():
    torch.manual_seed(0)
    teacher, model = make_model(), make_model()
    held_out = make_data(2000, teacher)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    checkpoints = []
    for step in range(STEPS):
        inputs, targets = make_data(16, teacher)
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= STEPS // 2 and (step + 1) % (STEPS // 2 // KEPT) == 0:
            checkpoints.append(checkpoint(model))

    def error(weights):
        model.load_state_dict(weights)
        with torch.no_grad():
            return 1000 * torch.nn.functional.mse_loss(model(held_out[0]), held_out[1]).item()

    base, *experts = checkpoints
    errors = [error(weights) for weights in checkpoints]
    print("error on held-out data, in thousandths")
    print(f"{'best checkpoint':16s}  {min(errors):8.2f}")
    print(f"{'last checkpoint':16s}  {errors[-1]:8.2f}")
    for method in ("average", "karcher"):
        merged = cfmerge.merge_state_dicts(base, experts, method)
        print(f"{method:16s}  {error(merged):8.2f}")


if __name__ == "__main__":
    main()
