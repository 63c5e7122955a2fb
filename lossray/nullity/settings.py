"""The [degeneracy] section of a study file."""

from typing import Annotated, Literal

from pydantic import Field

from lossray.settings import Settings


class DegeneracySettings(Settings):
    """The [degeneracy] section, which switches on the table `degeneracy`.

    Attributes:
        dense_up_to: largest order of a matrix whose eigenvalues are all computed: the number of parameters,
            or for the Gauss-Newton matrix that of examples times outputs. About a second at 3,000.
        checkpoints: the first and the last, or all.
        polish: whether the same is done at a critical point to which damped Newton steps lead from the
            checkpoint, where they lead to one. Each of the steps forms the matrix anew.
    """

    dense_up_to: Annotated[int, Field(ge=0)] = 2500
    checkpoints: Literal["ends", "all"] = "ends"
    polish: bool = False
