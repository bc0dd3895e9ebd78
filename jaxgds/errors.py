"""The one exception of this package that is not a builtin."""


class CheckpointError(ValueError):
    """A checkpoint is damaged or is not what its metadata says; names the file and the array."""
