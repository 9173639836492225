"""Adapting a model: settings, trainable weights, losses, checkpoints and resumption."""
