"""The training process: `train_adapter`, its trainer, callbacks and checkpoints."""
