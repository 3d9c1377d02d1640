"""Row rules quarantine rows, the batch contract stops the run: `validate.validate`, `contract`, `propose`."""
