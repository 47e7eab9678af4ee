"""Training on labels that may be wrong: two networks that filter for each other, and unlearning."""
