"""What surrounds HLFS: set-up, demo, examples."""
