"""How an interrupted run resumes: checkpoints, atomic files, the lock of its folder, stop signals."""
