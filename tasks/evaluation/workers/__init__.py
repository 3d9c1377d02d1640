"""The evaluation process: lm-eval over one load of each base, our tasks and its own."""
