"""Formats: a quantized weight is a module. Mathematics, bit packing and modules, each in its own file."""
