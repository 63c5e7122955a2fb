"""How many eigenvalues are zero: counts, the noise floor, a rank, and what architecture and data force."""
