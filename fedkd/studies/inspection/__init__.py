"""`fedkd inspect`: what of its teachers a student has taken over, beyond its accuracy."""
