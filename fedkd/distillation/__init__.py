"""The student's training: batches, objective, trainer, assistants."""
