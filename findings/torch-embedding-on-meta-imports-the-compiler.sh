#!/usr/bin/env bash
# A network is built on the meta device, so that nothing is allocated or drawn, and is then filled with
# the weights of a file.
#
# Guess: under `with torch.device("meta")` building is quicker than on the CPU, because initial values
# are not drawn; certainly for one small nn.Embedding.
# Behaviour: drawing uniform numbers on meta (nn.Linear, nn.Conv2d) does nothing, but drawing normal
# numbers (nn.Embedding, nn.init.normal_) goes through a Python decomposition of torch, whose first
# call imports torch._dynamo and sympy: hundreds of modules, and seconds. On the CPU the same line
# imports nothing.
# Met by: programs that build a transformer on meta in order to start quickly, such as a command that
# paints one picture: a text encoder's table of tokens costs more time than loading its weights. Nothing
# warns; a profile shows the time in an import that no line of the program asks for.
#
# Seen with torch 2.15.0, Python 3.11:
#   Linear on meta:    0 modules more
#   Embedding on cpu:  0 modules more
#   Embedding on meta: 907 modules more, torch._dynamo: True, sympy: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -qq torch==2.15.0 numpy==2.4.6
cd "$work"
cat > script.py <<'PYTHON'
import sys

import torch
from torch import nn


def more(make, device):
    before = len(sys.modules)
    with torch.device(device):
        make(2, 2)
    return len(sys.modules) - before


with torch.device("meta"):  # the first use of the context itself
    torch.zeros(1)
print("torch", torch.__version__)
print("guess: no module more in any case")
linear = more(nn.Linear, "meta")
print(f"Linear on meta:    {linear} modules more")
cpu = more(nn.Embedding, "cpu")
print(f"Embedding on cpu:  {cpu} modules more")
meta = more(nn.Embedding, "meta")
loaded = [name in sys.modules for name in ("torch._dynamo", "sympy")]
print(f"Embedding on meta: {meta} modules more, torch._dynamo: {loaded[0]}, sympy: {loaded[1]}")
assert (linear, cpu) == (0, 0) and meta > 300 and all(loaded)
PYTHON
"$work/env/bin/python" script.py
