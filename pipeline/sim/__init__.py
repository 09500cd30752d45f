"""A rover in simulation whose four sensors see one physical world: MuJoCo moves it, everything else follows.

``cues`` says what is to be told apart and what each sensor can observe of it; ``ranges`` from which worlds a session
is drawn; ``script`` what happens when; ``world`` is the MuJoCo model, ``stage`` plays the script in it and ``rover``
drives and lets time pass; ``lidar``, ``camera`` and ``sound`` turn the state of the world into what a sensor would
say; ``session`` is all of it together, as messages with honest times; ``generate`` writes recordings.

Only this package imports MuJoCo, which the extra ``sim`` installs.
"""
