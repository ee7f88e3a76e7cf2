"""What things cost in time and memory: one command per question."""
