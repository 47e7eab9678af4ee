"""What teachers share about the transfer set, and nothing else."""
