"""Training a student from a store: options, data, models, the trainer, and the folder of a run."""
