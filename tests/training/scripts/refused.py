"""Asks for one process, whatever was launched."""

import tiny

tiny.engine_of("one_process")
