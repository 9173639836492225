"""Adapting a model: settings, what is trained, losses, and stopping and resuming."""
