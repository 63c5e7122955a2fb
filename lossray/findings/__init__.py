"""What the tables say: tests, intervals and the verdicts on the paper's claims."""
