"""The error of every verb."""


class PipelineError(ValueError):
    """The given model, text, store and dictionary do not fit together, or disk or memory is too small."""
