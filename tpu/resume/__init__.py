"""How an interrupted run resumes: checkpoints, atomic writes, the lock of the run folder, stop signals."""
