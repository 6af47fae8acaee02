"""A package, lest one of that name among the installed ones (torch-fidelity has it) hides it."""
