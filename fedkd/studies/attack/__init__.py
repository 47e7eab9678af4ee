"""What attacks on the knowledge cost the student, by fusion rule."""
