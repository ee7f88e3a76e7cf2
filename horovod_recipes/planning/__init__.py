"""What a job will need and how long it will take, computed before it runs."""
