"""Small additions to a frozen stage, trained and kept apart from its weights.

Each is attached to a stage that has the weights to begin with, and is what its run exports; it
names in its file the network that it was trained for.
"""
