"""What runs the tasks of a plan; the result does not depend on it."""
