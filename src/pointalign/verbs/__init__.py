"""The verbs of the command: a dataclass each, whose fields are its options and whose `run` does it."""
