"""Graph rewrites, one pass per file; ``base.py`` says what a pass is."""
