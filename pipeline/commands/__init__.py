"""What the commands do, once ``pipeline.cli`` has understood what was asked.

A command returns when it is done and raises otherwise: a SensoriumError says by its ``exit_code`` whether the user
asked wrongly or it failed. Modules are imported when their command is asked for: `sensorium --help` loads none.
"""
