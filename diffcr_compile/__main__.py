"""``python -m diffcr_compile`` is ``diffcr``."""

from diffcr_compile.cli import main

main()
