"""The errors a user can meet. Each names the thing, the value and the remedy, and pickles across Ray.

Ray rebuilds an exception from its ``args``; every class here therefore takes only positional strings and
passes all of them to ``Exception.__init__``.
"""


class LossrayError(Exception):
    """Base of every error that lossray raises on purpose: the message is all that a user needs."""


class StudyError(LossrayError):
    """A study file, an option or an argument that cannot be used."""


class DataError(LossrayError):
    """Data that cannot be read or do not fit the study."""


class ModelError(LossrayError):
    """A model, loss or optimizer that cannot be built or does not fit the data."""


class StoreError(LossrayError):
    """A store that is damaged, belongs to another study, or is in use by another driver."""


class ResourceError(LossrayError):
    """Work that does not fit the machine; the message says what would."""
