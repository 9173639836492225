"""Names of the files in which a training run records itself."""

RESULTS = "results.json"
TRAIN_CONFIG = "train_config.json"
