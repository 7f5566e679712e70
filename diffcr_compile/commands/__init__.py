"""The verbs of ``diffcr``, one file each; ``cli.py`` puts them together."""
