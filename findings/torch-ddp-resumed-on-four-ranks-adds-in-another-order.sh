#!/usr/bin/env bash
# Four CPU processes train with DistributedDataParallel (gloo). One training runs through; the other
# wraps its network anew in the middle, as a process does that resumes from a checkpoint: same weights,
# same data, plain SGD without state.
#
# Guess: both end with the same weights, bit for bit, as they do on one process or two.
# Behaviour: on four ranks they differ in the last bits. The order in which gloo adds the numbers of
# more than two ranks depends on their places in DDP's buckets, and DDP fills its buckets anew after
# the first step of each wrapping, in the order in which gradients arrived. So the first step after
# resuming adds in another order than the same step of a training that was not interrupted.
# Met by: whoever promises, or tests, that a resumed run equals one that was never killed. Tests with
# two ranks pass, since a + b is b + a. Nothing warns, and losses agree to many digits for a while.
#
# Seen with torch 2.15.0, Python 3.11:
#   2 ranks: equal
#   4 ranks: differ
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -qq torch==2.15.0 numpy==2.4.6
cd "$work"
cat > script.py <<'PYTHON'
import sys

import torch
from torch import distributed, multiprocessing, nn


class Net(nn.Module):
    """Registers its layers in another order than that in which their gradients arrive."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first, self.second = nn.Linear(40, 7), nn.Linear(30, 50), nn.Linear(50, 40)

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


def trained(wrapped_at, rank):
    net = Net()
    for step in range(8):
        if step in wrapped_at:
            ddp = nn.parallel.DistributedDataParallel(net)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x = torch.randn(3, 30, generator=torch.Generator().manual_seed(100 * step + rank))
        ddp(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def ranked(rank, world, folder, queue):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world
    )
    same = torch.equal(trained({0}, rank), trained({0, 4}, rank))
    distributed.destroy_process_group()
    if rank == 0:
        queue.put(same)


if __name__ == "__main__":
    print("torch", torch.__version__)
    print("guess: equal on any number of ranks")
    context, found = multiprocessing.get_context("spawn"), {}
    for world in (2, 4):
        queue = context.SimpleQueue()
        multiprocessing.spawn(ranked, (world, sys.argv[1], queue), nprocs=world)
        found[world] = queue.get()
        print(f"{world} ranks: {'equal' if found[world] else 'differ'}")
    assert found == {2: True, 4: False}
PYTHON
"$work/env/bin/python" script.py "$work"
