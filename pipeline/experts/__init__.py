"""Python experts: encoders that are a published detector and some state, where a bundle has no trained graph.

An expert turns what one stream says about one step into a token of probabilities. It is deterministic: the same steps
in the same order give the same tokens, whatever the load and however often ``reset`` was called before. It holds the
state that a detector needs between steps (a track, a recurrence) and nothing that outlives an epoch.

A bundle names one as ``python: pipeline.experts.face:Face``. An expert of your own has the same five members::

    class Expert:
        token: int                                                  # length of what encode returns
        def __init__(self, stream: str, settings: dict) -> None     # raises BundleError
        def reset(self) -> None                                     # a new epoch, or a new session
        def encode(self, content, start_ns: int, end_ns: int)       # tuple of messages or grid -> f4 [token]
        def skip(self) -> None                                      # a masked step: time passes, nothing is known
"""
