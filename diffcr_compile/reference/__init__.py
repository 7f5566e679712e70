"""The reference DiT that ships with the package: model, sampler and quality metric."""
