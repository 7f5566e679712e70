"""Which diffusion transformers the compiler supports: every model of the zoo through every step.

``__main__.py`` is the command, ``processes.py`` runs the models, ``one_model.py`` takes one of them through
the steps, ``reference.py`` says what is right, ``record.py`` keeps what was found, ``table.py`` shows it.
"""
