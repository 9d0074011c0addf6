"""How `powernap train` ends, for schedulers and scripts. README.md lists them."""

FAILED = 1  # such as a rank that went away: start again with --resume
WRONG_USE = 2  # of the command or of a recipe: starting it again will not help
HUNG = 70  # a rank waited longer than parallel.timeout_seconds (EX_SOFTWARE)
PREEMPTED = 75  # asked to stop (SIGTERM, SIGUSR1, SIGHUP), checkpoint written: start again with --resume (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C
