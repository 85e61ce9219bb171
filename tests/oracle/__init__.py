"""A training run as a person would write it with torch and transformers alone, to judge train.py by.

Nothing here imports heiretsu or train.py: what the two share is docs/repeat-a-run.md, which states what a run is. The
tests run train.py as a command, and read its log and its checkpoints as any other program would.
"""
