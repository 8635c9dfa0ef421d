"""The parts of a step that torch does too slowly on a CPU, in C++ compiled where it runs."""
