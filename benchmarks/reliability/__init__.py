"""The hard tests: kills, corruption, random models, load. ``make soak`` runs them in full."""
