#!/usr/bin/env bash
# A network is built on the meta device, to count its parameters or to shard it before it is filled.
#
# Guess: under `with torch.device("meta")` every tensor that is made without a device is on meta,
# whatever the process did before.
# Behaviour: transformers replaces torch.linspace while from_pretrained works, and torch notes which
# functions torch.device covers once, at the first use of any such context in the process. If
# from_pretrained is that first use, torch notes the replacement. From then on torch.linspace alone
# makes CPU tensors under every torch.device context, and nothing is said.
# Met by: noise schedules, position tables and Fourier features, which are made of linspace, in networks
# built on meta (or on a GPU) after a frozen text encoder was loaded: the buffers are on the CPU, so
# that building fails ("Tensor on device meta is not on the expected device cpu"), or only in the
# order in which the tests happen to run.
#
# Seen with torch 2.13.0, transformers 5.23.0, Python 3.11:
#   before loading: linspace meta, arange meta
#   after loading:  linspace cpu, arange meta
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -qq torch==2.13.0 transformers==5.23.0 safetensors==0.8.0
cd "$work"
cat > script.py <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from transformers import T5Config, T5EncoderModel, logging


def devices():
    with torch.device("meta"):
        return torch.linspace(0, 1, 3).device.type, torch.arange(3).device.type


logging.disable_progress_bar()
if sys.argv[1] == "first":  # a use of the context before anything is loaded, and all is well
    print("before loading: linspace {}, arange {}".format(*devices()))
config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
T5EncoderModel(config).save_pretrained("t5")
T5EncoderModel.from_pretrained("t5")
found = devices()
print("after loading:  linspace {}, arange {}".format(*found))
if sys.argv[1] == "first":
    assert found == ("meta", "meta"), found
else:
    print("torch", version("torch"), "transformers", version("transformers"))
    print("guess:          linspace meta, arange meta")
    assert found == ("cpu", "meta"), found
PYTHON
"$work/env/bin/python" script.py first
"$work/env/bin/python" script.py loaded
