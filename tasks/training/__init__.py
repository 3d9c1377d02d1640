"""One arm trained in a process of its own: `train.train_arm`; start: `warm_start`; memory: `plan`."""
