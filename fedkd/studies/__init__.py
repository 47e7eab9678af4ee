"""Many runs compared: distillation, attacks, audits, contributions, unlearning."""
