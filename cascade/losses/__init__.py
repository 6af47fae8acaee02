"""Further losses, which a training may add to that of its process.

Each is a module, called as `loss(stage, batch, x0, call)`, that returns the loss of each sample. It
is attached to a stage for its training alone (`Stage.attach`): its parameters are trained and
checkpointed, but neither exported nor sampled from. `watched` are blocks of the network whose
outputs it reads, and `teacher` is the frozen network behind it.
"""
