"""The engine on a GPU: KV in device memory that follows the arena, CUDA graphs for decode."""
