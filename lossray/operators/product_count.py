"""How many curvature products this process has computed."""

from dataclasses import dataclass


@dataclass
class ProductCount:
    """Counts every product of an operator with a vector; read before and after a piece of work.

    The column `matvecs` counts what one solve asks for, per run. This counts what is computed, whatever for:
    the curvature along directions, sharpness and slices too, and the products of members that wait for others
    of their pack.

    Attributes:
        total: products of one member's operator with one vector, since the process began.
    """

    total: int = 0


PRODUCTS = ProductCount()
