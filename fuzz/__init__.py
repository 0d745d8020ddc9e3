"""Fuzzing: files and prompts that nobody would write, thrown at whatever reads them.

    targets/    one module for each thing that reads: its `check`, its nearly valid inputs, its seeds
    contract    what holds for every input: it is read whole or refused in one line, at little cost
    damage      nearly valid inputs: a file as a list of fields, some of which are damaged
    bundle      several files as one input
    calls       calls of C functions that are made of bytes, for the target `native`
    sanitized   the C extension, built so that a bad access ends the process
    engine      one target under atheris: coverage decides which inputs are kept and changed again
    campaign    several targets, so many minutes each, with a table at the end: `make fuzz MINUTES=5`
    replay      inputs tried again: a finding, the corpus, what the corpus covers
    corpus/     a folder of small inputs for each target: the seeds, and findings of the past

`make test` replays the corpus and tries a fixed number of nearly valid inputs (tests/fuzz).
"""

from . import sanitized

sanitized.load()
