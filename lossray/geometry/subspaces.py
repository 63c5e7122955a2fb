"""Which leading eigenspaces a direction is held against."""


def subspaces(n_outputs: int, dim: int) -> dict[str, int]:
    """Dimension k < d by name: the top eigenvector, the top 5, C - 1, C and 2 C for C outputs."""
    dims = sorted({5, n_outputs - 1, n_outputs, 2 * n_outputs})
    sizes = {"v1": 1} | {f"top{k}": k for k in dims if k > 1}
    return {name: k for name, k in sizes.items() if k < dim}
