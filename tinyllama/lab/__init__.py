"""What the notebooks use: pictures, exercises, the playground and the stepper."""
