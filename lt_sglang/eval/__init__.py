"""What lazy layers cost, and which to choose: tasks, metrics and statistics of ``eval`` and ``calibrate``.

Nothing here imports sglang: engines are asked over HTTP.
"""
