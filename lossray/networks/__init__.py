"""Models, losses, and R models of one architecture as one stack."""
