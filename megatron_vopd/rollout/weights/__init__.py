"""The student's weights on their way into engines: shared memory, CUDA IPC, NCCL."""
