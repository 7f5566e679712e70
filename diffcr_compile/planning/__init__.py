"""What ``inspect`` does: a dry run of a model, and the plan that is made of it."""
