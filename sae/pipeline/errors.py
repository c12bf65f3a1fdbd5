"""The error of every verb."""


class PipelineError(ValueError):
    """The pieces given do not belong together, or there is no room for the work."""
